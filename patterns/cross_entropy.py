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
from fxopt.kernels.launch import wide_dtype
from fxopt.patterns.logits import check_loss, flattened, loss_attributes, loss_of, shaped
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import Term, either, maybe, reshape, tensor, upcast


def search() -> Term:
    """Return the loss of logits, through scale, softcap, upcast and flattening in the models' orders."""
    logits = tensor("logits", "* V")
    z = either(shaped(maybe(reshape, maybe(upcast, logits)), upcast), logits)
    return loss_of(flattened(z, upcast))


def check(m: Match) -> Mismatch | None:
    """Refuse what the op does not compute: other reductions, soft labels, classes in another dim."""
    refusal = check_loss(m)
    if refusal is not None:
        return refusal
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
    loss = call(fused_cross_entropy, logits, m["labels"], **loss_attributes(m))
    own = wide_dtype(example.dtype)
    return loss if m.output.dtype == own else call(cast_tensor, loss, dtype=m.output.dtype)


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


def _with_z_loss(coefficient: float, **options: Any) -> Callable[..., torch.Tensor]:
    """Return a loss function of (logits, labels) that adds a z-loss over all rows."""

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = _loss(**options)(logits, labels)
        return found + coefficient * logits.logsumexp(dim=-1).to(dtype=found.dtype).pow(2).mean()

    return loss


def _with_masked_z_loss(
    reduction: str, denominator: Any = None, divide: Any = None
) -> Callable[..., torch.Tensor]:
    """Return a loss function of (logits, labels) that adds a z-loss over the labelled rows."""

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = _loss(reduction=reduction, denominator=denominator)(logits, labels)
        mask = labels != -100
        z_loss = (logits.float().logsumexp(-1).square() * mask).sum()
        if divide is not None or denominator is not None:
            z_loss = z_loss / (denominator if divide is None else divide)
        elif reduction == "mean":
            z_loss = z_loss / mask.sum()
        return found + 1e-2 * z_loss

    return loss


def _by_halves(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    flat = logits.view(-1, logits.shape[-1])
    return F.nll_loss(F.log_softmax(flat, dim=-1, dtype=torch.float32), labels.view(-1))


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
        "sum over a number": _loss(reduction="sum", denominator=7),
        "log softmax": _by_halves,
        "flattened first": _loss(lambda z: torch.tanh(z.view(-1, 63).float() / 5.0) * 5.0),
        "z-loss": _with_z_loss(1e-2),
        "z-loss of labelled rows": _with_masked_z_loss("mean"),
        "z-loss in a sum over a number": _with_masked_z_loss("sum", 7),
        "z-loss in a sum over items": _with_masked_z_loss("sum", torch.tensor(7, device=device)),
        "z-loss in a sum": _with_masked_z_loss("sum"),
        "z-loss beside a sum": _with_z_loss(1e-2, reduction="sum", denominator=7),
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

    def read_twice(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_softmax = F.log_softmax(logits, dim=-1)
        return F.nll_loss(log_softmax, labels) + log_softmax.mean()

    yield "every loss", (_loss(reduction="none"), (logits, labels)), "reduction is 'none'"
    yield "log softmax read", (read_twice, (logits, labels)), "expected cross_entropy, got nll_loss"
    yield "soft labels", (on_probabilities, (logits, soft)), "labels: expected shape [N]"
    yield "classes in the middle", (in_the_middle, (logits, labels)), "labels: expected shape [N]"
    yield (
        "class weights",
        (_loss(weight=torch.ones(9, device=device)), (logits, labels)),
        "weight of cross_entropy: expected None, got",
    )


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield broken losses: they must be left alone, or be computed as they stand."""
    inputs = _inputs(device, torch.float32, 4, 9)
    yield "another cap", (_loss(lambda z: torch.tanh(z / 5.0) * 4.0), inputs)
    yield (
        "another z-loss",
        (lambda z, t: F.cross_entropy(z, t) + 0.1 * (z * 2).logsumexp(-1).pow(2).mean(), inputs),
    )
    yield "z-loss by another divisor", (_with_masked_z_loss("mean", divide=7), inputs)
    yield (
        "z-loss masked by other labels",
        (
            lambda z, t: (
                F.cross_entropy(z, t, ignore_index=3)
                + 0.1 * (z.logsumexp(-1).pow(2) * (t != -100)).sum() / (t != -100).sum()
            ),
            (inputs[0], inputs[1].clamp(min=0)),
        ),
    )
    yield "z-loss not squared", (lambda z, t: F.cross_entropy(z, t) + 0.1 * z.logsumexp(-1).mean(), inputs)
    yield (
        "z-loss of labelled rows over all",
        (lambda z, t: F.cross_entropy(z, t) + 0.1 * (z.logsumexp(-1).pow(2) * (t != -100)).mean(), inputs),
    )
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
    part_of=("linear_cross_entropy",),
)
