"""The kernels: a row of logits into its loss and the parts of lse; a tile of a row into its gradient."""

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import as_rows, ceil_div, jit, num_warps_for, on_device, tl
from fxopt.kernels.launcher import launch
from fxopt.kernels.row_loss import (
    Shaping,
    columns_per_tile,
    find_divisor,
    find_gradient,
    find_row_loss,
    find_statistics,
    find_z_weight,
    label_weight,
)

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
