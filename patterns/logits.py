"""What both loss patterns say of class logits: their shaping, the loss of their rows, and what no op computes.

Source: transformers `ForCausalLMLoss` (upcast, flattening, denominator), `Gemma2ForCausalLM` (softcap),
`CohereForCausalLM` (scale), `GraniteForCausalLM` (division), `BambaForCausalLM` (z-loss).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxopt.rewriting.pattern import Match, Mismatch
from fxopt.rewriting.terms import (
    Term,
    attribute,
    cast,
    choice,
    contiguous,
    cross_entropy,
    either,
    logsumexp,
    maybe,
    mean_of_all,
    number,
    reshape,
    tanh,
    tensor,
)

Step = Callable[[Term], Term]


def shaped(logits: Term, casting: Step, hold: Step = lambda term: term) -> Term:
    """Return `logits` through scale and softcap, cast in between; each step is passed through `hold`."""
    z = hold(maybe(casting, logits))
    z = hold(choice("scaling", times=z * number("factor"), over=z / number("factor"), none=z))
    z = hold(maybe(casting, z))
    z = hold(choice("capping", capped=tanh(z / number("softcap")) * number("softcap"), none=z))
    return hold(maybe(casting, z))


def flattened(z: Term, casting: Step) -> Term:
    """Return `z` as rows of classes: cast, copied to a dense layout and reshaped, each or none of it."""
    return prepared(maybe(reshape, prepared(z, casting)), casting)


def prepared(z: Term, casting: Step) -> Term:
    """Return `z`, cast and copied to a dense layout in either order, or as it is."""
    return maybe(casting, maybe(contiguous, maybe(casting, z)))


def loss_of(rows: Term) -> Term:
    """Return the cross entropy of `rows`, divided or not, and a z-loss over all of them or none."""
    loss = cross_entropy(
        rows,
        tensor("labels", "N"),
        ignore_index=attribute("ignore_index"),
        reduction=attribute("reduction"),
        label_smoothing=attribute("label_smoothing"),
    )
    loss = either(loss / tensor("denominator", ""), loss / number("items"), loss)
    lse = maybe(cast, logsumexp(rows))
    square = either(lse**2, lse * lse)
    z_loss = either(mean_of_all(square) * number("z_loss"), mean_of_all(square * number("z_loss")))
    # The z-loss first: a sum with anything else is no near miss.
    return either(maybe(cast, z_loss) + maybe(cast, loss), loss)


def check_loss(m: Match) -> Mismatch | None:
    """Refuse what no op computes: other reductions, soft labels, a mean divided once more."""
    reduction, denominator = m["reduction"], m["denominator"]
    is_divided = denominator is not None or m["items"] is not None
    if reduction not in ("mean", "sum"):
        return m.fail(f"reduction is {reduction!r}, expected 'mean' or 'sum'", "labels")
    if not isinstance(m["ignore_index"], int) or not isinstance(m["label_smoothing"], int | float):
        return m.fail("ignore_index or label_smoothing is computed, expected numbers", "labels")
    if m.example("labels").dtype != torch.int64:
        return m.fail(f"labels are {m.example('labels').dtype}, expected int64", "labels")
    if is_divided and reduction != "sum":
        return m.fail("a mean is divided once more, expected a sum", "denominator")
    if denominator is not None and m.example("denominator").requires_grad:
        return m.fail("the denominator requires grad, expected a constant", "denominator")
    return None


def loss_attributes(m: Match) -> dict[str, Any]:
    """Return the attributes of either op for a match of `loss_of`."""
    return {
        "denominator": m["items"] if m["denominator"] is None else m["denominator"],
        "ignore_index": m["ignore_index"],
        "reduction": m["reduction"],
        "scale": _scale_of(m),
        "softcap": float(m["softcap"] or 0.0),
        "label_smoothing": float(m["label_smoothing"]),
        "z_loss": float(m["z_loss"] or 0.0),
        "z_rows": "all",
    }


def _scale_of(m: Match) -> float:
    if m["scaling"] == "times":
        return float(m["factor"])
    return 1.0 / float(m["factor"]) if m["scaling"] == "over" else 1.0
