"""Cross entropy of logits [N, V] against labels [N], and its gradient.

The formula, the divisor and what happens to odd labels stand in `row_loss`, which this op applies to given logits.

Source: `torch.nn.functional.cross_entropy`; transformers `ForCausalLMLoss` (denominator), `Gemma2ForCausalLM`
(softcap), `CohereForCausalLM` (scale).

Saved for backward: logits, labels, lse fp32 [2, N] as max z and lse - max z (0 in rows that are not read), divisor
fp32 []. Backward writes the gradient to a new tensor, since logits may be an output of the model.

Numerics: fp32, the loss too; the gradient is rounded once. Ignored rows are not read (but for `z_rows="all"`), and
their gradient is 0 whatever they hold. No host synchronization.
"""

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import (
    as_rows,
    can_launch,
    ceil_div,
    jit,
    num_warps_for,
    on_device,
    register_gradient,
    register_op,
    tl,
    wide_dtype,
)
from fxopt.kernels.launcher import launch
from fxopt.kernels.row_loss import (
    SHAPING_SCHEMA,
    Shaping,
    as_tensor,
    check_loss,
    columns_per_tile,
    find_divisor,
    find_gradient,
    find_row_loss,
    find_statistics,
    find_z_weight,
    label_weight,
    plain_gradient,
    plain_losses,
    plain_statistics,
    reference_loss,
    shape_plainly,
)


def cross_entropy_reference(
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
    """Return the loss, differentiable, in plain torch: the specification."""
    shaping = Shaping(scale, softcap, label_smoothing, z_loss, z_rows == "all")
    return reference_loss(logits, labels, denominator, ignore_index, reduction == "mean", shaping)


def plain_forward(
    logits: Tensor,
    labels: Tensor,
    denominator: Tensor | None,
    ignore_index: int,
    mean: bool,
    *shaping: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, the two parts of lse, and divisor, in plain torch."""
    form = Shaping(*shaping)
    divisor = find_divisor(labels, denominator, ignore_index, mean, wide_dtype(logits.dtype))
    z, _ = shape_plainly(logits, form, divisor.dtype)
    lse = plain_statistics(z)
    z_weight = find_z_weight(divisor, labels.shape[0], form)
    losses = plain_losses(z, labels, lse, z_weight, ignore_index, form)
    if not form.reads_ignored_rows:
        lse = torch.where(labels != ignore_index, lse, 0.0)
    return losses.sum() / divisor, lse, divisor


def plain_backward(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    divisor: Tensor,
    ignore_index: int,
    *shaping: Any,
) -> Tensor:
    """Return the gradient of logits, in plain torch."""
    form = Shaping(*shaping)
    z, tanh = shape_plainly(logits, form, lse.dtype)
    z_weight = find_z_weight(divisor, labels.shape[0], form)
    dlogits = plain_gradient(z, tanh, labels, lse, z_weight, ignore_index, form)
    divided = dlogits * (dloss / divisor)
    if not form.reads_ignored_rows:  # 0 / 0 where every row is ignored
        divided = torch.where((labels != ignore_index).unsqueeze(-1), divided, 0.0)
    return divided.to(logits.dtype).contiguous()


BLOCK_COLUMNS = 4096


@jit
def cross_entropy_forward_kernel(
    p_logits,
    p_labels,
    p_z_weight,
    p_losses,
    p_lse,
    row_stride,
    num_columns,
    ignore_index,
    scale,
    softcap,
    label_smoothing,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z: tl.constexpr,
    READ_IGNORED: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write the loss of one row and the two parts of its lse."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(p_labels + row)
    loss = 0.0
    zero_point = 0.0
    rest = 0.0
    if (label != ignore_index) | READ_IGNORED:
        p_logits += row * row_stride
        zero_point, rest, total = find_statistics(
            p_logits,
            num_columns,
            num_columns,
            scale,
            softcap,
            HAS_SOFTCAP,
            HAS_SMOOTHING,
            BLOCK_COLUMNS,
        )
        z_weight = tl.load(p_z_weight) if HAS_Z else 0.0
        loss = find_row_loss(
            p_logits,
            label,
            ignore_index,
            zero_point,
            rest,
            total,
            num_columns,
            scale,
            softcap,
            label_smoothing,
            z_weight,
            HAS_SOFTCAP,
            HAS_SMOOTHING,
        )
    tl.store(p_losses + row, loss)
    tl.store(p_lse + row, zero_point)
    tl.store(p_lse + tl.num_programs(0) + row, rest)


@jit(do_not_specialize=["num_rows", "blocks_per_row"])
def cross_entropy_backward_kernel(
    p_dloss,
    p_divisor,
    p_z_weight,
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
    HAS_SOFTCAP: tl.constexpr,
    HAS_Z: tl.constexpr,
    READ_IGNORED: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write the gradient of one tile of one row of logits."""
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    b_columns = (program % blocks_per_row) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    b_mask = b_columns < num_columns
    label = tl.load(p_labels + row)
    b_d = tl.zeros([BLOCK_COLUMNS], tl.float32)
    if (label != ignore_index) | READ_IGNORED:
        zero_point = tl.load(p_lse + row)
        rest = tl.load(p_lse + num_rows + row)
        b_logits = tl.load(p_logits + row * row_stride + b_columns, mask=b_mask, other=0.0)
        z_weight = tl.load(p_z_weight) if HAS_Z else 0.0
        b_d = find_gradient(
            b_logits,
            b_columns,
            label,
            label_weight(label, ignore_index, num_columns),
            zero_point,
            rest,
            num_columns,
            scale,
            softcap,
            label_smoothing,
            z_weight,
            HAS_SOFTCAP,
        )
        b_d *= scale * (tl.load(p_dloss) / tl.load(p_divisor))
    b_d = b_d.to(p_dlogits.dtype.element_ty)
    tl.store(p_dlogits + row * num_columns + b_columns, b_d, mask=b_mask)


def launch_forward(
    logits: Tensor,
    labels: Tensor,
    denominator: Tensor | None,
    ignore_index: int,
    mean: bool,
    *shaping: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, the two parts of lse, and divisor, by the kernel."""
    form = Shaping(*shaping)
    logits, labels = as_rows(logits), labels.contiguous()
    num_rows, num_columns = logits.shape
    losses = logits.new_empty(num_rows, dtype=torch.float32)
    lse = logits.new_empty((2, num_rows), dtype=torch.float32)
    divisor = find_divisor(labels, denominator, ignore_index, mean, torch.float32)
    z_weight = find_z_weight(divisor, num_rows, form)
    block = columns_per_tile(num_columns, BLOCK_COLUMNS)
    if num_rows:
        with on_device(logits):
            launch(
                cross_entropy_forward_kernel,
                (num_rows,),
                logits,
                labels,
                z_weight,
                losses,
                lse,
                logits.stride(0),
                num_columns,
                ignore_index,
                form.scale,
                form.softcap,
                form.label_smoothing,
                HAS_SOFTCAP=form.softcap != 0,
                HAS_SMOOTHING=form.label_smoothing != 0,
                HAS_Z=z_weight is not None,
                READ_IGNORED=form.reads_ignored_rows,
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
    *shaping: Any,
) -> Tensor:
    """Return the gradient of logits, by the kernel."""
    form = Shaping(*shaping)
    logits, labels = as_rows(logits), labels.contiguous()
    num_rows, num_columns = logits.shape
    dlogits = logits.new_empty(logits.shape)
    z_weight = find_z_weight(divisor, num_rows, form)
    block = columns_per_tile(num_columns, BLOCK_COLUMNS)
    blocks_per_row = ceil_div(num_columns, block)
    if num_rows:
        with on_device(logits):
            launch(
                cross_entropy_backward_kernel,
                (num_rows * blocks_per_row,),
                dloss,
                divisor,
                z_weight,
                logits,
                labels,
                lse,
                dlogits,
                logits.stride(0),
                num_rows,
                num_columns,
                blocks_per_row,
                ignore_index,
                form.scale,
                form.softcap,
                form.label_smoothing,
                HAS_SOFTCAP=form.softcap != 0,
                HAS_Z=z_weight is not None,
                READ_IGNORED=form.reads_ignored_rows,
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
)
_backward_op = register_op(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, Tensor divisor, "
    f"int ignore_index, {SHAPING_SCHEMA}) -> Tensor",
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
