"""What both loss patterns say of class logits: their shaping, the loss of their rows, and what no op computes.

Source: transformers `ForCausalLMLoss` (upcast, flattening, denominator), `Gemma2ForCausalLM` (softcap),
`CohereForCausalLM` (scale), `GraniteForCausalLM` (division), `BambaForCausalLM` (z-loss).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxopt.graph import vocabulary
from fxopt.graph.arguments import same_shape
from fxopt.rewriting.pattern import Match, Mismatch
from fxopt.rewriting.terms import (
    Term,
    attribute,
    cast,
    choice,
    contiguous,
    cross_entropy,
    either,
    keep,
    logsumexp,
    maybe,
    mean_of_all,
    named,
    not_equal,
    number,
    reshape,
    sum_of_all,
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
    """Return the cross entropy of `rows`, divided or not, alone or with a z-loss."""
    loss = cross_entropy(
        rows,
        tensor("labels", "N"),
        ignore_index=attribute("ignore_index"),
        reduction=attribute("reduction"),
        label_smoothing=attribute("label_smoothing"),
    )
    loss = divided("divisor", loss)
    # The z-loss first: a sum with anything else is no near miss.
    return either(maybe(cast, z_loss_of(rows)) + maybe(cast, loss), loss)


def divided(name: str, total: Term, **more: Term) -> Term:
    """Return `total` by a number, by a tensor or as it is; `name` binds which."""
    denominator, items = tensor("denominator", ""), number("items")
    return choice(name, **more, denominator=total / denominator, items=total / items, none=total)


def z_loss_of(rows: Term) -> Term:
    """Return the mean square of lse over all rows, or its sum over labelled ones by a divisor, times a number."""
    factor = number("z_loss")
    lse = maybe(cast, logsumexp(rows))
    square = named("square", either(lse**2, lse * lse))
    of_all = either(mean_of_all(square) * factor, mean_of_all(square * factor))

    is_labelled = named("is_labelled", not_equal(tensor("mask_labels"), attribute("ignore_index")))
    mask = maybe(cast, keep(is_labelled, cheap=True))
    total = sum_of_all(square * mask)
    of_labelled = divided("z_divisor", total, count=total / sum_of_all(mask)) * factor
    return choice("z_rows", all=of_all, labelled=of_labelled)


def check_loss(m: Match) -> Mismatch | None:
    """Refuse what no op computes: other reductions, soft labels, a mean divided once more."""
    reduction, denominator = m["reduction"], m["denominator"]
    if reduction not in ("mean", "sum"):
        return m.fail(f"reduction is {reduction!r}, expected 'mean' or 'sum'", "labels")
    if not isinstance(m["ignore_index"], int) or not isinstance(m["label_smoothing"], int | float):
        return m.fail("ignore_index or label_smoothing is computed, expected numbers", "labels")
    if m.example("labels").dtype != torch.int64:
        return m.fail(f"labels are {m.example('labels').dtype}, expected int64", "labels")
    if m["divisor"] != "none" and reduction != "sum":
        return m.fail("a mean is divided once more, expected a sum", "denominator")
    if denominator is not None and m.example("denominator").requires_grad:
        return m.fail("the denominator requires grad, expected a constant", "denominator")
    return _check_labelled(m) if m["z_rows"] == "labelled" else None


def _check_labelled(m: Match) -> Mismatch | None:
    """Refuse a z-loss over labelled rows whose divisor or whose labels are not those of the loss."""
    expected = "count" if m["reduction"] == "mean" else m["divisor"]
    if m["z_divisor"] != expected:
        return m.fail(f"the z-loss is divided by {m['z_divisor']}, expected {expected} as the loss", "square")
    labels = m["labels"]
    while labels is not m["mask_labels"]:
        if labels.target not in (vocabulary.reshape, vocabulary.contiguous):
            return m.fail("the z-loss is masked by other labels than the loss", "is_labelled")
        labels = labels.args[0]
    if not same_shape(m.example("square"), m.example("is_labelled")):
        return m.fail("the mask of the z-loss is broadcast", "is_labelled")
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
        "z_rows": m["z_rows"] or "all",
    }


def _scale_of(m: Match) -> float:
    if m["scaling"] == "times":
        return float(m["factor"])
    return 1.0 / float(m["factor"]) if m["scaling"] == "over" else 1.0
