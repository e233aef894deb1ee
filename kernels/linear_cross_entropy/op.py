"""The torch op `linear_cross_entropy`, its gradient, and both in plain torch.

Saved for backward: the gradients: dh [N, H] and dW [V, H] in the dtype of h and W (dW in fp32 for fp16), db [V] in
fp32; and a divisor, fp32 [].
"""

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import Declared, can_launch, register_gradient, register_op, wide_dtype
from fxopt.kernels.linear_cross_entropy.chunks import (
    MOST_ROUNDED_SUMS,
    Outputs,
    padded,
    plan_chunk_bytes,
    plan_chunk_rows,
    run_chunks,
)
from fxopt.kernels.linear_cross_entropy.kernels import launch_backward, launch_forward
from fxopt.kernels.row_loss import (
    SHAPING_SCHEMA,
    Shaping,
    as_tensor,
    check_loss,
    plain_gradient,
    plain_losses,
    plain_statistics,
    reference_loss,
    shape_plainly,
)


def linear_cross_entropy_reference(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
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
    """Return the loss, differentiable, in plain torch: the specification."""
    shaping = Shaping(scale, softcap, label_smoothing, z_loss, z_rows == "all")
    if not shaping.reads_ignored_rows:
        valid = labels != ignore_index
        h, labels = h[valid], labels[valid]
    logits = torch.nn.functional.linear(h, weight, bias)
    return reference_loss(logits, labels, denominator, ignore_index, reduction == "mean", shaping)


def _plain_rows(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    divisor: Tensor,
    z_weight: Tensor | None,
    ignore_index: int,
    shaping: Shaping,
    with_gradient: bool,
) -> None:
    z, tanh = shape_plainly(logits, shaping, losses.dtype)
    statistics = plain_statistics(z)
    rows = plain_losses("linear_cross_entropy", z, labels, statistics, z_weight, ignore_index, shaping)
    losses.copy_(rows)
    if with_gradient:
        logits.copy_(plain_gradient(z, tanh, labels, statistics, z_weight, ignore_index, shaping) / divisor)


def plain_forward(h: Tensor, *rest: Any) -> Outputs:
    """Return loss, the divisor left for backward, and the gradients needed, in plain torch."""
    with torch.autocast(h.device.type, enabled=False):
        return run_chunks(_plain_rows, h, *rest)


def plain_backward(
    dloss: Tensor,
    divisor: Tensor,
    dh: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients times dloss / divisor, new tensors of `dtype`, in plain torch."""
    factor = (dloss / divisor).to(divisor.dtype)
    dh, dweight, dbias = (
        None if gradient is None else (gradient.to(factor.dtype) * factor).to(dtype)
        for gradient in (dh, dweight, dbias)
    )
    return dh, dweight, dbias


def _fused_forward(h: Tensor, weight: Tensor, *rest: Any) -> Outputs:
    return (launch_forward if can_launch(h, weight) else plain_forward)(h, weight, *rest)


def _fused_backward(
    dloss: Tensor,
    divisor: Tensor,
    dh: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    run = launch_backward if can_launch(divisor, out_dtype=dtype) else plain_backward
    return run(dloss, divisor, dh, dweight, dbias, dtype)


def _fake_forward(h: Tensor, weight: Tensor, labels: Tensor, *rest: Any) -> Outputs:
    need_h, need_weight, need_bias = rest[-3:]
    wide = wide_dtype(h.dtype)
    return Outputs(
        h.new_empty((), dtype=wide),
        h.new_empty((), dtype=wide),
        h.new_empty(h.shape) if need_h else None,
        weight.new_empty(weight.shape, dtype=wide if h.dtype == torch.float16 else None)
        if need_weight
        else None,
        weight.new_empty(weight.shape[0], dtype=wide) if need_bias else None,
    )


def _fake_backward(
    dloss: Tensor,
    divisor: Tensor,
    dh: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dh, dweight, dbias = (
        None if gradient is None else gradient.new_empty(gradient.shape, dtype=dtype)
        for gradient in (dh, dweight, dbias)
    )
    return dh, dweight, dbias


def _flops(h: Tensor, weight: Tensor, *arguments: Any) -> int:
    """Count the logits and the products of the gradients that are asked for."""
    *_, need_h, need_weight, _need_bias = arguments
    return 2 * h.numel() * weight.shape[0] * (1 + need_h + need_weight)


def _workspace(h: Tensor, weight: Tensor, *arguments: Any) -> int:
    """Return the bytes of one chunk's logits and of its rows of h and dh, and of sums of dW that are rounded last."""
    chunk_bytes, _need_h, need_weight, _need_bias = arguments[-4:]
    row_bytes = padded(weight.shape[0]) * h.element_size()
    rows = plan_chunk_rows(h.shape[0], row_bytes, chunk_bytes)
    is_rounded_last = need_weight and h.dtype != torch.float16 and h.shape[0] > rows * MOST_ROUNDED_SUMS
    wide = wide_dtype(h.dtype)
    sums = weight.numel() * wide.itemsize if is_rounded_last and weight.dtype != wide else 0
    return rows * (row_bytes + 2 * h.shape[-1] * h.element_size()) + sums


def _moved(h: Tensor, weight: Tensor, *arguments: Any) -> int:
    """Return the bytes of the logits, read twice and turned into their gradient."""
    return 3 * h.shape[0] * weight.shape[0] * h.element_size()


_forward_op = register_op(
    "linear_cross_entropy(Tensor h, Tensor weight, Tensor labels, Tensor? bias, Tensor? denominator, "
    f"int ignore_index, bool mean, {SHAPING_SCHEMA}, "
    "int chunk_bytes, bool need_h, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    plain=plain_forward,
    fused=_fused_forward,
    fake=_fake_forward,
    flops=_flops,
    declared=Declared(workspace=_workspace, moved=_moved, labels=("labels",)),
)
_backward_op = register_op(
    "linear_cross_entropy_backward(Tensor dloss, Tensor divisor, Tensor? dh, Tensor? dweight, Tensor? dbias, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    plain=plain_backward,
    fused=_fused_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.computed = inputs[-3:]
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if dloss is None:
        return (None,) * ctx.num_inputs
    h_weight_bias = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    for name, needed, computed in zip(("h", "weight", "bias"), h_weight_bias, ctx.computed, strict=True):
        if needed and not computed:
            raise RuntimeError(
                f"linear_cross_entropy: the gradient of {name} was not computed in forward, expected need_{name}=True"
            )
    dh, dweight, dbias = _backward_op(dloss, *ctx.saved_tensors, ctx.dtype)
    return dh, dweight, None, dbias, *(None,) * (ctx.num_inputs - 4)


_apply = register_gradient("linear_cross_entropy", _forward_op, _setup_context, _backward)


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    denominator: Tensor | float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    z_rows: str = "labelled",
    chunk_bytes: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the cross entropy of h weight^T + bias against `labels`: a scalar of `out_dtype`, fp32 by default.

    h: [N, H]; weight: [V, H]; bias: [V] or None; all of one float dtype; labels: [N], integers; denominator: one
    number, constant, or None; softcap 0: none; z_rows as in `cross_entropy`; chunk_bytes: the most that logits may take
    at any time; None: 512 MiB, with the gradient of weight up to 1 GiB.

    >>> linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([1, -100]))
    tensor(1.3863)
    """
    if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1] or labels.shape != h.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: expected h [N, H], weight [V, H] and labels [N], "
            f"got {tuple(h.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if weight.dtype != h.dtype or (bias is not None and bias.dtype != h.dtype):
        raise ValueError(
            f"linear_cross_entropy: expected one dtype, got {h.dtype}, {weight.dtype}"
            + ("" if bias is None else f" and {bias.dtype}")
        )
    check_loss("linear_cross_entropy", reduction, z_rows, denominator)
    grad = torch.is_grad_enabled()
    trains_weight = grad and weight.requires_grad
    if chunk_bytes is None:
        chunk_bytes = plan_chunk_bytes(weight.shape[0], h.element_size(), trains_weight=trains_weight)
    loss = _apply(
        h,
        weight,
        labels,
        bias,
        as_tensor(denominator, h),
        ignore_index,
        reduction == "mean",
        *Shaping(scale, softcap, label_smoothing, z_loss, z_rows == "all"),
        chunk_bytes,
        grad and h.requires_grad,
        trains_weight,
        grad and bias is not None and bias.requires_grad,
    )[0]
    return loss if out_dtype is None else loss.to(out_dtype)
