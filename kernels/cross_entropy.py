"""Cross entropy of logits [N, V] against labels [N], and its gradient.

    z     = softcap * tanh(scale * logits / softcap)        scale * logits without a softcap
    lse   = log sum exp z
    row   = (1 - smoothing) * (lse - z[label]) + smoothing * (lse - mean z) + z_loss * lse^2
    loss  = sum of the rows whose label is not ignore_index / divisor
    divisor: the denominator if given, else the number of those rows for "mean", else 1

Source: `torch.nn.functional.cross_entropy`; transformers `ForCausalLMLoss` (denominator), `Gemma2ForCausalLM`
(softcap), `CohereForCausalLM` (scale); z_loss from Chowdhery et al. 2022, "PaLM", section 5.

Saved for backward: logits, labels, lse fp32 [2, N] as max z and lse - max z, which keeps small differences of large
logits (0 in ignored rows), divisor fp32 []. Backward writes the gradient to a new tensor, since logits may be an output
of the model.

Numerics: fp32, the loss too; the gradient is rounded once. Infinite and NaN logits give what torch gives.
Ignored rows are not read, and their gradient is 0 whatever they hold. A label outside [0, V) raises on a CPU and
gives a NaN loss on a GPU. No host synchronization.
"""

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import (
    as_rows,
    can_launch,
    ceil_div,
    jit,
    next_power_of_two,
    num_warps_for,
    on_device,
    register_gradient,
    register_op,
    tl,
)

REDUCTIONS = ("mean", "sum")


def cross_entropy_reference(
    logits: Tensor,
    labels: Tensor,
    *,
    denominator: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Return the loss, differentiable, in plain torch: the specification."""
    valid = labels != ignore_index
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = logits[valid].to(wide) * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    log_softmax = torch.log_softmax(z, -1)
    rows = -(1 - label_smoothing) * log_softmax.gather(-1, labels[valid].unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        rows = rows - label_smoothing * log_softmax.mean(-1)
    if z_loss:
        rows = rows + z_loss * z.logsumexp(-1).square()
    return rows.sum() / _divisor(labels, denominator, ignore_index, reduction == "mean", wide)


def _divisor(
    labels: Tensor, denominator: Tensor | None, ignore_index: int, mean: bool, dtype: torch.dtype
) -> Tensor:
    if denominator is not None:
        return denominator.detach().to(labels.device, dtype, copy=True).reshape(())
    if mean:
        return (labels != ignore_index).sum(dtype=dtype)
    return torch.ones((), dtype=dtype, device=labels.device)


def plain_forward(
    logits: Tensor,
    labels: Tensor,
    denominator: Tensor | None,
    ignore_index: int,
    mean: bool,
    scale: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, the two parts of lse, and divisor, in plain torch."""
    loss = cross_entropy_reference(
        logits,
        labels,
        denominator=denominator,
        ignore_index=ignore_index,
        reduction="mean" if mean else "sum",
        scale=scale,
        softcap=softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    z = logits.to(loss.dtype) * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    largest = z.amax(-1) if z.numel() else z.sum(-1)
    rest = (z - largest.unsqueeze(-1)).logsumexp(-1)
    lse = torch.where(labels != ignore_index, torch.stack([largest, rest]), 0.0)
    return loss, lse, _divisor(labels, denominator, ignore_index, mean, loss.dtype)


def plain_backward(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    divisor: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Return the gradient of logits, in plain torch."""
    valid = (labels != ignore_index).unsqueeze(-1)
    z = logits.to(lse.dtype) * scale
    tanh = torch.tanh(z / softcap) if softcap else None
    if tanh is not None:
        z = softcap * tanh
    largest, rest = lse.unsqueeze(-1)
    lse = largest + rest
    dz = torch.exp(z - largest - rest) * (1 + 2 * z_loss * lse) - label_smoothing / z.shape[-1]
    index = torch.where(valid, labels.unsqueeze(-1), 0)
    dz = dz.scatter_add(-1, index, torch.full_like(lse, label_smoothing - 1))
    if tanh is not None:
        dz = dz * (1 - tanh.square())
    return torch.where(valid, dz * (scale * (dloss / divisor)), 0.0).to(logits.dtype).contiguous()


BLOCK_COLUMNS = 4096
LOG2E = tl.constexpr(1.4426950408889634)


@jit
def _shape(b_logits, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return z, and tanh(scale * logits / softcap) if there is a softcap."""
    b_z = b_logits.to(tl.float32) * scale
    b_tanh = b_z
    if HAS_SOFTCAP:
        b_tanh = 2 * tl.sigmoid(2 * b_z / softcap) - 1
        b_z = softcap * b_tanh
    return b_z, b_tanh


@jit
def cross_entropy_forward_kernel(
    p_logits,
    p_labels,
    p_losses,
    p_lse,
    row_stride,
    num_columns,
    ignore_index,
    scale,
    softcap,
    label_smoothing,
    z_loss,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write the loss of one row and the two parts of its lse."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(p_labels + row)
    loss = 0.0
    zero_point = 0.0
    rest = 0.0
    if label != ignore_index:
        p_logits += row * row_stride
        is_class = (label >= 0) & (label < num_columns)
        target = tl.load(p_logits + label, mask=is_class, other=float("nan"))
        z_target, _tanh = _shape(target, scale, softcap, HAS_SOFTCAP)
        largest = float("-inf")
        b_sum = tl.zeros([BLOCK_COLUMNS], tl.float32)
        b_total = tl.zeros([BLOCK_COLUMNS], tl.float32)
        for start in range(0, num_columns, BLOCK_COLUMNS):
            b_columns = start + tl.arange(0, BLOCK_COLUMNS)
            b_mask = b_columns < num_columns
            b_z, _b_tanh = _shape(
                tl.load(p_logits + b_columns, mask=b_mask, other=0.0), scale, softcap, HAS_SOFTCAP
            )
            if HAS_SMOOTHING:
                b_total += tl.where(b_mask, b_z, 0.0)
            b_z = tl.where(b_mask, b_z, float("-inf"))
            larger = tl.maximum(largest, tl.max(b_z, 0))
            zero_point = tl.where(larger == float("-inf"), 0.0, larger)  # -inf - -inf would be NaN
            b_sum = b_sum * tl.exp2((largest - zero_point) * LOG2E) + tl.exp2((b_z - zero_point) * LOG2E)
            largest = larger
        zero_point = tl.where(largest == float("-inf"), 0.0, largest)
        rest = tl.log(tl.sum(b_sum, 0))
        lse = zero_point + rest
        loss = (zero_point - z_target) + rest
        if HAS_SMOOTHING:
            mean_loss = (zero_point - tl.sum(b_total, 0) / num_columns) + rest
            loss = (1 - label_smoothing) * loss + label_smoothing * mean_loss
        loss += z_loss * lse * lse
    tl.store(p_losses + row, loss)
    tl.store(p_lse + row, zero_point)
    tl.store(p_lse + tl.num_programs(0) + row, rest)


@jit
def cross_entropy_backward_kernel(
    p_dloss,
    p_divisor,
    p_logits,
    p_labels,
    p_lse,
    p_dlogits,
    row_stride,
    num_rows,
    num_columns,
    blocks_per_row,
    ignore_index,
    scale,
    softcap,
    label_smoothing,
    z_loss,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write the gradient of one tile of one row of logits."""
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    b_columns = (program % blocks_per_row) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    b_mask = b_columns < num_columns
    label = tl.load(p_labels + row)
    b_d = tl.zeros([BLOCK_COLUMNS], tl.float32)
    if label != ignore_index:
        largest = tl.load(p_lse + row)
        rest = tl.load(p_lse + num_rows + row)
        b_logits = tl.load(p_logits + row * row_stride + b_columns, mask=b_mask, other=0.0)
        b_z, b_tanh = _shape(b_logits, scale, softcap, HAS_SOFTCAP)
        b_d = tl.exp2((b_z - largest - rest) * LOG2E) * (1 + 2 * z_loss * (largest + rest))
        b_d -= label_smoothing / num_columns
        b_d = tl.where(b_columns == label, b_d - (1 - label_smoothing), b_d)
        if HAS_SOFTCAP:
            b_d *= 1 - b_tanh * b_tanh
        b_d *= scale * (tl.load(p_dloss) / tl.load(p_divisor))
    b_d = b_d.to(p_dlogits.dtype.element_ty)
    tl.store(p_dlogits + row * num_columns + b_columns, b_d, mask=b_mask)


def launch_forward(
    logits: Tensor,
    labels: Tensor,
    denominator: Tensor | None,
    ignore_index: int,
    mean: bool,
    scale: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, the two parts of lse, and divisor, by the kernel."""
    logits, labels = as_rows(logits), labels.contiguous()
    num_rows, num_columns = logits.shape
    losses = logits.new_empty(num_rows, dtype=torch.float32)
    lse = logits.new_empty((2, num_rows), dtype=torch.float32)
    divisor = _divisor(labels, denominator, ignore_index, mean, torch.float32)
    block = min(BLOCK_COLUMNS, next_power_of_two(num_columns))
    if num_rows:
        with on_device(logits):
            cross_entropy_forward_kernel[(num_rows,)](
                logits,
                labels,
                losses,
                lse,
                logits.stride(0),
                num_columns,
                ignore_index,
                scale,
                softcap,
                label_smoothing,
                z_loss,
                HAS_SOFTCAP=softcap != 0,
                HAS_SMOOTHING=label_smoothing != 0,
                BLOCK_COLUMNS=block,
                num_warps=num_warps_for(block),
                enable_fp_fusion=False,  # z must be the same number here and in backward, or exp(z - lse) drifts
            )
    return losses.sum() / divisor, lse, divisor


def launch_backward(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    divisor: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Return the gradient of logits, by the kernel."""
    logits, labels = as_rows(logits), labels.contiguous()
    num_rows, num_columns = logits.shape
    dlogits = logits.new_empty(logits.shape)
    block = min(BLOCK_COLUMNS, next_power_of_two(num_columns))
    blocks_per_row = ceil_div(num_columns, block)
    if num_rows:
        with on_device(logits):
            cross_entropy_backward_kernel[(num_rows * blocks_per_row,)](
                dloss,
                divisor,
                logits,
                labels,
                lse,
                dlogits,
                logits.stride(0),
                num_rows,
                num_columns,
                blocks_per_row,
                ignore_index,
                scale,
                softcap,
                label_smoothing,
                z_loss,
                HAS_SOFTCAP=softcap != 0,
                BLOCK_COLUMNS=block,
                num_warps=num_warps_for(block),
                enable_fp_fusion=False,  # as in forward
            )
    return dlogits


def _fused_forward(logits: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (launch_forward if can_launch(logits) else plain_forward)(logits, labels, *rest)


def _fused_backward(dloss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return (launch_backward if can_launch(logits) else plain_backward)(dloss, logits, *rest)


def _fake_forward(logits: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty((), dtype=wide),
        logits.new_empty((2, *labels.shape), dtype=wide),
        logits.new_empty((), dtype=wide),
    )


def _fake_backward(dloss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_SHAPING = "float scale, float softcap, float label_smoothing, float z_loss"
_forward_op = register_op(
    "cross_entropy(Tensor logits, Tensor labels, Tensor? denominator, int ignore_index, bool mean, "
    f"{_SHAPING}) -> (Tensor, Tensor, Tensor)",
    plain=plain_forward,
    fused=_fused_forward,
    fake=_fake_forward,
)
_backward_op = register_op(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, Tensor divisor, "
    f"int ignore_index, {_SHAPING}) -> Tensor",
    plain=plain_backward,
    fused=_fused_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, _, ignore_index, _, *shaping = inputs
    _, lse, divisor = output
    ctx.save_for_backward(logits, labels, lse, divisor)
    ctx.mark_non_differentiable(lse, divisor)
    ctx.set_materialize_grads(False)
    ctx.attributes = (ignore_index, *shaping)


def _backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    dlogits = None
    if dloss is not None and ctx.needs_input_grad[0]:
        dlogits = _backward_op(dloss, *ctx.saved_tensors, *ctx.attributes)
    return dlogits, *(None,) * 8


register_gradient("cross_entropy", _setup_context, _backward)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    denominator: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Return the cross entropy of `logits` against `labels`: a scalar, fp32 (fp64 for fp64 logits).

    logits: [N, V], any float dtype; labels: [N], integers; denominator: one number, constant, or None; softcap 0: none.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]))
    tensor(1.3863)
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"cross_entropy: expected logits [N, V] and labels [N], "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"cross_entropy: reduction, expected one of {REDUCTIONS}, got {reduction!r}")
    if denominator is not None and denominator.requires_grad:
        raise ValueError("cross_entropy: denominator requires grad, expected a constant")
    mean = reduction == "mean"
    loss, _, _ = _forward_op(
        logits, labels, denominator, ignore_index, mean, scale, softcap, label_smoothing, z_loss
    )
    return loss
