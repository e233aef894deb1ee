"""Cross entropy of logits that something else reads too -> one op, the logits kept in their own dtype.

Source: transformers `ForCausalLMLoss`, `ForTokenClassification`, `ForSequenceClassificationLoss`.
Saved for backward: logits (live anyway), one fp32 number per row. Stock saves log-probabilities in fp32.
Numerics: in fp32 whatever the dtype of the logits, so an upcast before the loss is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.graph.vocabulary import cast as cast_tensor
from fxopt.graph.vocabulary import reshape as reshape_tensor
from fxopt.kernels.cross_entropy import cross_entropy as fused_cross_entropy
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    attribute,
    choice,
    contiguous,
    cross_entropy,
    either,
    maybe,
    number,
    reshape,
    tanh,
    tensor,
    upcast,
)


def search() -> Term:
    """Return the loss of logits, through scale, softcap, upcast and flattening."""
    logits = tensor("logits", "* V")
    z = maybe(upcast, logits)
    z = choice("scaling", times=z * number("factor"), over=z / number("factor"), none=z)
    z = either(tanh(z / number("softcap")) * number("softcap"), z)
    z = maybe(upcast, maybe(contiguous, maybe(upcast, z)))
    z = maybe(upcast, maybe(reshape, z))
    loss = cross_entropy(
        z,
        tensor("labels", "N"),
        ignore_index=attribute("ignore_index"),
        reduction=attribute("reduction"),
        label_smoothing=attribute("label_smoothing"),
    )
    return either(loss / tensor("denominator", ""), loss)


def check(m: Match) -> Mismatch | None:
    """Refuse what the op does not compute: other reductions, soft labels, classes in another dim."""
    reduction, denominator = m["reduction"], m["denominator"]
    if reduction not in ("mean", "sum"):
        return m.fail(f"reduction is {reduction!r}, expected 'mean' or 'sum'", "labels")
    if not isinstance(m["ignore_index"], int) or not isinstance(m["label_smoothing"], int | float):
        return m.fail("ignore_index or label_smoothing is computed, expected numbers", "labels")
    if m.example("labels").dtype != torch.int64:
        return m.fail(f"labels are {m.example('labels').dtype}, expected int64", "labels")
    if denominator is not None and reduction != "sum":
        return m.fail("a mean is divided once more, expected a sum", "denominator")
    if denominator is not None and m.example("denominator").requires_grad:
        return m.fail("the denominator requires grad, expected a constant", "denominator")
    (loss,) = (node for node in m.nodes if node.target is F.cross_entropy)
    read: Any = loss.args[0]
    shape, classes = read.meta["example_value"].shape, m.example("logits").shape[-1]
    if len(shape) != 2 or shape[-1] != classes or not isinstance(classes, int):
        return m.fail(f"the loss reads {list(shape)}, expected rows of {classes} classes", "logits")
    return None


def replace(m: Match) -> Call:
    """Return one call of the fused op on rows of logits."""
    logits, example = m["logits"], m.example("logits")
    if example.dim() != 2:
        logits = call(reshape_tensor, logits, shape=(-1, example.shape[-1]))
    loss = call(
        fused_cross_entropy,
        logits,
        m["labels"],
        denominator=m["denominator"],
        ignore_index=m["ignore_index"],
        reduction=m["reduction"],
        scale=_scale_of(m),
        softcap=float(m["softcap"] or 0.0),
        label_smoothing=float(m["label_smoothing"]),
    )
    own = torch.float64 if example.dtype == torch.float64 else torch.float32
    return loss if m.output.dtype == own else call(cast_tensor, loss, dtype=m.output.dtype)


def _scale_of(m: Match) -> float:
    if m["scaling"] == "times":
        return float(m["factor"])
    return 1.0 / float(m["factor"]) if m["scaling"] == "over" else 1.0


def _loss(
    prepare: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float,
    denominator: Any = None,
    **options: Any,
) -> Callable[..., torch.Tensor]:
    """Return a loss function of (logits, labels) in one of the models' forms."""

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        z = prepare(logits)
        found = F.cross_entropy(z.view(-1, z.shape[-1]), labels.view(-1), **options)
        return found if denominator is None else found / denominator

    return loss


def _inputs(device: torch.device, dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(*shape, dtype=dtype, device=device, requires_grad=True)
    labels = torch.randint(0, shape[-1], shape[:-1], device=device)
    labels[..., ::3] = -100
    return logits, labels


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield losses of given logits: cast, flattened, scaled, capped, sliced, summed."""
    forms: dict[str, Callable[..., torch.Tensor]] = {
        "cast": _loss(),
        "as they are": _loss(lambda z: z),
        "sliced": _loss(lambda z: z[..., :, 1:].contiguous().float()),
        "scaled": _loss(lambda z: (z * 0.5).float()),
        "divided": _loss(lambda z: z.float() / 3.0),
        "capped": _loss(lambda z: (torch.tanh(z / 5.0) * 5.0).float()),
        "sum over items": _loss(reduction="sum", denominator=torch.tensor(7, device=device)),
        "sum": _loss(reduction="sum"),
        "smoothed": _loss(label_smoothing=0.1),
    }
    for name, function in forms.items():
        labels = _inputs(device, torch.bfloat16, 2, 9, 62)[1] if name == "sliced" else None
        logits, own = _inputs(device, torch.bfloat16, 2, 9, 63)
        yield f"{name} bf16", (function, (logits, own if labels is None else labels))
    yield "cast fp16", (_loss(), _inputs(device, torch.float16, 2, 9, 63))
    yield "as they are fp32", (_loss(lambda z: z), _inputs(device, torch.float32, 13, 63))


def near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
    """Yield code that must be left alone, and a part of the reason."""
    logits, labels = _inputs(device, torch.float32, 4, 9)
    soft = torch.softmax(torch.randn(4, 9, device=device), -1)

    def in_the_middle(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.view(2, 2, 9).transpose(1, 2), labels.view(2, 2))

    def on_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels)

    yield "every loss", (_loss(reduction="none"), (logits, labels)), "reduction is 'none'"
    yield "soft labels", (on_probabilities, (logits, soft)), "labels: expected shape [N]"
    yield "classes in the middle", (in_the_middle, (logits, labels)), "labels: expected shape [N]"
    yield "class weights", (_loss(weight=torch.ones(9, device=device)), (logits, labels)), "expected None"


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield broken losses: they must be left alone, or be computed as they stand."""
    inputs = _inputs(device, torch.float32, 4, 9)
    yield "another cap", (_loss(lambda z: torch.tanh(z / 5.0) * 4.0), inputs)
    yield "mean divided", (_loss(denominator=torch.tensor(7.0, device=device)), inputs)
    yield "other ignored label", (_loss(ignore_index=3), (inputs[0], inputs[1].clamp(min=0)))
    yield "rounded logits", (_loss(lambda z: z.to(torch.bfloat16)), inputs)
    yield "log of the loss", (lambda z, t: F.cross_entropy(z, t).log(), inputs)
    yield "scaled twice", (_loss(lambda z: z * 2.0 * 0.25), inputs)


CROSS_ENTROPY = Pattern(
    name="cross_entropy",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    source="transformers ForCausalLMLoss, ForTokenClassification, ForSequenceClassificationLoss",
)
