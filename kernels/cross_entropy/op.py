"""The ops `fxopt::cross_entropy` and `fxopt::cross_entropy_backward`, and the function that models' graphs call."""

from typing import Any

from torch import Tensor

from fxopt.kernels.cross_entropy.kernels import launch_backward, launch_forward
from fxopt.kernels.cross_entropy.reference import plain_backward, plain_forward
from fxopt.kernels.launch import Declared, can_launch, register_gradient, register_op, wide_dtype
from fxopt.kernels.row_loss import SHAPING_SCHEMA, Shaping, as_tensor, check_loss


def _fused_forward(logits: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (launch_forward if can_launch(logits) else plain_forward)(logits, labels, *rest)


def _fused_backward(dloss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return (launch_backward if can_launch(logits) else plain_backward)(dloss, logits, *rest)


def _fake_forward(logits: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(logits.dtype)
    return (
        logits.new_empty((), dtype=wide),
        logits.new_empty((2, *labels.shape), dtype=wide),
        logits.new_empty((), dtype=wide),
    )


def _fake_backward(dloss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_forward_op = register_op(
    "cross_entropy(Tensor logits, Tensor labels, Tensor? denominator, int ignore_index, bool mean, "
    f"{SHAPING_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    plain=plain_forward,
    fused=_fused_forward,
    fake=_fake_forward,
    declared=Declared(labels=("labels",)),
)
_backward_op = register_op(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, Tensor divisor, "
    f"int ignore_index, {SHAPING_SCHEMA}) -> Tensor",
    plain=plain_backward,
    fused=_fused_backward,
    fake=_fake_backward,
    declared=Declared(labels=("labels",)),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, _, ignore_index, _, *shaping = inputs
    _, lse, divisor = output
    ctx.save_for_backward(logits, labels, lse, divisor)
    ctx.mark_non_differentiable(lse, divisor)
    ctx.set_materialize_grads(False)
    ctx.attributes = (ignore_index, *shaping)
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    dlogits = None
    if dloss is not None and ctx.needs_input_grad[0]:
        dlogits = _backward_op(dloss, *ctx.saved_tensors, *ctx.attributes)
    return dlogits, *(None,) * (ctx.num_inputs - 1)


_apply = register_gradient("cross_entropy", _forward_op, _setup_context, _backward)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    denominator: Tensor | float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    z_rows: str = "labelled",
) -> Tensor:
    """Return the cross entropy of `logits` against `labels`: a scalar, fp32 (fp64 for fp64 logits).

    logits: [N, V], any float dtype; labels: [N], integers; denominator: one number, constant, or None; softcap 0: none;
    z_rows: "labelled" puts z_loss into the loss of each row that has a label, "all" adds its mean over all rows.

    >>> import torch
    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]))
    tensor(1.3863)
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"cross_entropy: expected logits [N, V] and labels [N], "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    check_loss("cross_entropy", reduction, z_rows, denominator)
    shaping = Shaping(scale, softcap, label_smoothing, z_loss, z_rows == "all")
    loss, _, _ = _apply(
        logits, labels, as_tensor(denominator, logits), ignore_index, reduction == "mean", *shaping
    )
    return loss
