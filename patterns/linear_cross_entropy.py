"""A linear head and the cross entropy of its logits -> one op that never holds all logits.

Source: transformers `ForCausalLMLoss`, `Gemma2ForCausalLM` (softcap), `CohereForCausalLM` (scale),
`GraniteForCausalLM` (division), and the shift by slicing of older models.
Saved for backward: the gradients of h, weight and bias. Stock saves the logits, twice or three times.
Numerics: logits rounded to the head's dtype as in the model, the rest in fp32.

The model also returns its logits: their nodes stay, and are computed only where something reads them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.graph.vocabulary import cast as cast_tensor
from fxopt.graph.vocabulary import reshape as reshape_tensor
from fxopt.kernels.linear_cross_entropy import linear_cross_entropy
from fxopt.patterns.logits import check_loss, flattened, loss_attributes, loss_of, shaped
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import Term, attribute, cast, either, keep, linear, maybe, named, reshape, tensor

EVERYTHING = slice(None)


def search() -> Term:
    """Return the loss of logits = h @ weight.T + bias, through scale, softcap, casts, shift, flattening."""
    h, weight, bias = tensor("h", "* H"), tensor("weight", "V H"), tensor("bias", "V")
    logits = keep(named("linear", either(linear(h, weight, bias), linear(h, weight))))
    whole = shaped(logits, cast, keep)
    whole = maybe(lambda z: z[attribute("rows")], whole, name="sliced")
    flat_first = shaped(keep(maybe(cast, keep(reshape(logits)))), cast, keep)
    return loss_of(either(flattened(whole, cast), flattened(flat_first, cast)))


def check(m: Match) -> Mismatch | None:
    """Refuse what the op does not compute: other reductions, soft labels, slices of the classes."""
    refusal = check_loss(m)
    if refusal is not None:
        return refusal
    if not all(isinstance(size, int) for size in m.example("weight").shape):
        return m.fail("the head's shape is symbolic, expected numbers", "weight")
    if m["rows"] is not None and not _keeps_classes(m["rows"], m.example("linear").dim()):
        return m.fail(
            f"logits are indexed by {m['rows']}, expected slices that leave the classes whole", "linear"
        )
    (loss,) = (node for node in m.nodes if node.target is F.cross_entropy)
    read: Any = loss.args[0]
    shape, classes = read.meta["example_value"].shape, m.example("weight").shape[0]
    if len(shape) != 2 or shape[-1] != classes:
        return m.fail(f"the loss reads {list(shape)}, expected rows of {classes} classes", "linear")
    return None


def _keeps_classes(index: Any, rank: int) -> bool:
    """Whether an index of logits means the same for hidden states: slices, none of the last dim."""
    entries = index if isinstance(index, tuple) else (index,)
    slices = [entry for entry in entries if entry is not ...]
    if not all(isinstance(entry, slice) for entry in slices):
        return False
    reaches_last = len(slices) == rank or (... in entries and entries[-1] is not ...)
    return not reaches_last or slices[-1] == EVERYTHING


def replace(m: Match) -> Call:
    """Return one call of the fused op on the rows of h that have a label, in the linear's dtype."""
    h, dtype = m["h"], m.example("linear").dtype
    if m["rows"] is not None:
        h = call(operator.getitem, h, m["rows"])
    if m.example("h").dim() != 2:
        h = call(reshape_tensor, h, shape=(-1, m.example("h").shape[-1]))
    return call(
        linear_cross_entropy,
        _in_dtype(m, "h", h, dtype),
        _in_dtype(m, "weight", m["weight"], dtype),
        m["labels"],
        _in_dtype(m, "bias", m["bias"], dtype),
        **loss_attributes(m),
        out_dtype=m.output.dtype,
    )


def _in_dtype(m: Match, name: str, value: Any, dtype: torch.dtype) -> Any:
    """Return `value`, cast as autocast casts the operands of a linear."""
    if value is None or m.example(name).dtype == dtype:
        return value
    return call(cast_tensor, value, dtype=dtype)


def _with_z_loss(
    logits_of: Callable[..., torch.Tensor] = F.linear, **options: Any
) -> Callable[..., torch.Tensor]:
    """Return a loss function of (h, weight, labels) that adds a z-loss over all positions."""

    def loss(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = logits_of(h, weight)
        found = _head(lambda h, w: logits, **options)(h, weight, labels)
        return found + 1e-2 * logits.logsumexp(dim=-1).to(dtype=found.dtype).pow(2).mean()

    return loss


def _with_masked_z_loss(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.linear(h, weight).float()
    mask = (labels != -100).float()
    z_loss = (logits.logsumexp(-1).pow(2) * mask).sum() / mask.sum()
    return F.cross_entropy(logits.view(-1, 63), labels.view(-1)) + 1e-3 * z_loss


def _head(
    logits_of: Callable[..., torch.Tensor] = F.linear,
    shift: str = "labels",
    denominator: Any = None,
    **options: Any,
) -> Callable[..., torch.Tensor]:
    """Return a loss function of (h, weight, labels) in one of the models' forms."""

    def loss(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = logits_of(h, weight)
        if shift == "labels":
            labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
            logits = logits.float()
        elif shift == "logits":
            logits, labels = logits[..., :-1, :].contiguous().float(), labels[..., 1:].contiguous()
        flat = logits.view(-1, logits.shape[-1])
        found = F.cross_entropy(flat, labels.view(-1), **options)
        return found if denominator is None else found / denominator

    return loss


def _inputs(device: torch.device, dtype: torch.dtype, *leading: int) -> tuple[torch.Tensor, ...]:
    h = torch.randn(*leading, 31, dtype=dtype, device=device, requires_grad=True)
    weight = (torch.randn(63, 31, device=device) / 5).to(dtype).requires_grad_()
    labels = torch.randint(0, 63, leading, device=device)
    labels[..., ::3] = -100
    return h, weight, labels


def _capped(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.tanh(F.linear(h, weight) / 30.0) * 30.0


def _flat_capped(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.tanh(F.linear(h, weight).view(-1, 63).float() * 0.5 / 30.0) * 30.0


def _by_halves(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    log_softmax = F.log_softmax(F.linear(h, weight).float().view(-1, 63), dim=-1)
    return F.nll_loss(log_softmax, labels.view(-1), ignore_index=-100)


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield the heads of decoder models: shifted by padding or by slicing, scaled, capped, summed."""
    bf16, fp32 = torch.bfloat16, torch.float32
    count = torch.tensor(7, device=device)
    forms: dict[str, Callable[..., torch.Tensor]] = {
        "padded labels": _head(),
        "sliced logits": _head(shift="logits"),
        "no shift": _head(shift="none"),
        "sum over items": _head(reduction="sum", denominator=count),
        "sum over a number": _head(reduction="sum", denominator=7),
        "sum": _head(reduction="sum", shift="logits"),
        "smoothed": _head(label_smoothing=0.1),
        "smoothed sum": _head(label_smoothing=0.1, reduction="sum", denominator=count, ignore_index=-100),
        "log softmax": _by_halves,
        "flattened first": _head(_flat_capped, shift="none"),
        "cast before the shift": _head(lambda h, w: F.linear(h, w).float(), shift="logits"),
        "z-loss": _with_z_loss(),
        "z-loss of labelled rows": _with_masked_z_loss,
        "z-loss of a capped head": _with_z_loss(_capped, reduction="sum", denominator=count),
        "scaled": _head(lambda h, w: F.linear(h, w) * 0.0625),
        "divided": _head(lambda h, w: F.linear(h, w) / 8.0, shift="logits"),
        "capped": _head(_capped),
        "matrix product": _head(lambda h, w: h @ w.t()),
        "bias": _head(lambda h, w: F.linear(h, w, w[:, 0])),
    }
    for name, function in forms.items():
        yield f"{name} bf16", (function, _inputs(device, bf16, 2, 9))
    for name in ("padded labels", "sliced logits", "capped"):
        yield f"{name} fp32", (forms[name], _inputs(device, fp32, 3, 5))
    yield "flat bf16", (_head(shift="none"), _inputs(device, bf16, 13))

    def frozen(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return _head()(h, weight.detach(), labels)

    yield "frozen head bf16", (frozen, _inputs(device, bf16, 2, 9))


def near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
    """Yield code that must be left alone, and a part of the reason."""
    h, weight, labels = _inputs(device, torch.float32, 2, 9)

    def read(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = F.linear(h, weight)
        loss = F.cross_entropy(logits.view(-1, 63), labels.view(-1))
        return loss + logits.mean() * loss

    def two_losses(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = F.linear(h, weight).view(-1, 63)
        return F.cross_entropy(logits, labels.view(-1)) + F.cross_entropy(logits, labels.view(-1).flip(0))

    def of_uncapped(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = F.linear(h, weight)
        loss = F.cross_entropy((torch.tanh(logits / 30.0) * 30.0).view(-1, 63), labels.view(-1))
        return loss + 0.1 * logits.logsumexp(-1).pow(2).mean()

    def other_divisor(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits, rows = F.linear(h, weight), labels.view(-1)
        z_loss = (logits.view(-1, 63).logsumexp(-1) ** 2 * (rows != -100)).sum() / 7
        return F.cross_entropy(logits.view(-1, 63), rows) + 0.1 * z_loss

    yield (
        "z-loss by another divisor",
        (other_divisor, (h, weight, labels)),
        "divided by items, expected count",
    )
    yield "z-loss of more rows", (_with_z_loss(shift="logits"), (h, weight, labels)), "got getitem"
    yield "z-loss of uncapped logits", (of_uncapped, (h, weight, labels)), "got mul(30.0)"
    yield "every loss", (_head(reduction="none"), (h, weight, labels)), "reduction is 'none'"
    yield "logits read", (read, (h, weight, labels)), "is also read by"
    yield "two losses", (two_losses, (h, weight, labels)), "is also read by"
    yield (
        "squared logits",
        (_head(lambda h, w: F.linear(h, w) ** 2), (h, weight, labels)),
        "or reshape, got pow",
    )
    yield (
        "class weights",
        (_head(weight=torch.ones(63, device=device)), (h, weight, labels)),
        "weight of cross_entropy: expected None, got",
    )


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield broken heads: they must be left alone, or be computed as they stand."""
    inputs = _inputs(device, torch.float32, 2, 9)

    def by_two(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = F.linear(h, weight)[..., :-2, :].contiguous().view(-1, 63)
        return F.cross_entropy(logits, labels[..., 2:].contiguous().view(-1))

    def fewer_classes(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = F.linear(h, weight)[..., :40].reshape(-1, 40)
        return F.cross_entropy(logits, labels.view(-1).clamp(max=39))

    def transposed(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(h, weight).transpose(1, 2), labels)

    def flat_then_sliced(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(h, weight).view(-1, 63)[1:], labels.view(-1)[:-1])

    yield "z-loss of more rows", (_with_z_loss(shift="logits"), inputs)
    yield "flattened before the shift", (flat_then_sliced, inputs)
    yield "shifted by two", (by_two, inputs)
    yield "fewer classes", (fewer_classes, inputs)
    yield "classes in the middle", (transposed, inputs)
    yield "another cap", (_head(lambda h, w: torch.tanh(F.linear(h, w) / 30.0) * 15.0), inputs)
    yield "mean divided", (_head(denominator=torch.tensor(7.0, device=device)), inputs)
    yield "scaled twice", (_head(lambda h, w: F.linear(h, w) * 2.0 * 0.25), inputs)
    yield (
        "other ignored label",
        (_head(shift="logits", ignore_index=-1), (*inputs[:2], inputs[2].clamp(min=-1))),
    )


LINEAR_CROSS_ENTROPY = Pattern(
    name="linear_cross_entropy",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    source="transformers ForCausalLMLoss, Gemma2ForCausalLM, CohereForCausalLM, GraniteForCausalLM",
)
