"""The kernels of `linear_cross_entropy`: a row of logits into its loss and gradient, and the scaling in backward.

The row kernel reads its row twice and writes it once. Its programs have 32 warps, so that no more than two of them fit
on a multiprocessor: few rows are in work at a time, most of them still in the L2 cache when they are read again (264
rows of 128,256 classes in bf16 are 67 MB, an H100's L2 is 50 MB), and the second reading starts at the end that was
read last.
"""

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import ceil_div, jit, num_warps_for, on_device, tl
from fxopt.kernels.launcher import launch
from fxopt.kernels.linear_cross_entropy.chunks import Outputs, run_chunks
from fxopt.kernels.row_loss import (
    Shaping,
    columns_per_tile,
    find_gradient,
    find_row_loss,
    find_statistics,
    label_weight,
)

BLOCK_COLUMNS = 16384
MOST_WARPS = 32
SCALE_BLOCK = 4096


@jit
def linear_cross_entropy_forward_kernel(
    p_logits,
    p_labels,
    p_losses,
    p_divisor,
    p_z_weight,
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
    WITH_GRADIENT: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write the loss of one row, and over its logits their gradient; the padding may be overwritten."""
    row = tl.program_id(0).to(tl.int64)
    p_logits += row * row_stride
    label = tl.load(p_labels + row)
    loss = 0.0
    if (label != ignore_index) | READ_IGNORED:
        zero_point, rest, total = find_statistics(
            p_logits,
            num_columns,
            row_stride,
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
        if WITH_GRADIENT:
            tl.debug_barrier()  # every thread has read the target's logit
            weight = label_weight(label, ignore_index, num_columns)
            factor = scale / tl.load(p_divisor)
            num_blocks = tl.cdiv(num_columns, BLOCK_COLUMNS)
            for block in range(num_blocks):
                # Backwards: the end of the row was read last and is still in cache.
                b_columns = (num_blocks - 1 - block) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
                b_mask = b_columns < row_stride
                b_d = find_gradient(
                    tl.load(p_logits + b_columns, mask=b_mask, other=0.0),
                    b_columns,
                    label,
                    weight,
                    zero_point,
                    rest,
                    num_columns,
                    scale,
                    softcap,
                    label_smoothing,
                    z_weight,
                    HAS_SOFTCAP,
                )
                tl.store(p_logits + b_columns, (b_d * factor).to(p_logits.dtype.element_ty), mask=b_mask)
    elif WITH_GRADIENT:
        for start in range(0, num_columns, BLOCK_COLUMNS):
            b_columns = start + tl.arange(0, BLOCK_COLUMNS)
            b_zero = tl.zeros([BLOCK_COLUMNS], p_logits.dtype.element_ty)
            tl.store(p_logits + b_columns, b_zero, mask=b_columns < row_stride)
    tl.store(p_losses + row, loss)


@jit
def linear_cross_entropy_backward_kernel(
    p_gradient, p_dloss, p_divisor, p_scaled, num_elements, BLOCK: tl.constexpr
):
    """Write gradient * dloss / divisor."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    b_at = tl.arange(0, BLOCK)
    b_mask = b_at < num_elements - start
    factor = tl.load(p_dloss).to(tl.float32) / tl.load(p_divisor)
    b_gradient = tl.load(p_gradient + start + b_at, mask=b_mask, other=0.0).to(tl.float32)
    tl.store(p_scaled + start + b_at, (b_gradient * factor).to(p_scaled.dtype.element_ty), mask=b_mask)


def _launch_rows(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    divisor: Tensor,
    z_weight: Tensor | None,
    ignore_index: int,
    shaping: Shaping,
    with_gradient: bool,
) -> None:
    num_rows, num_columns = logits.shape
    block = columns_per_tile(num_columns, BLOCK_COLUMNS)
    launch(
        linear_cross_entropy_forward_kernel,
        (num_rows,),
        logits,
        labels,
        losses,
        divisor,
        z_weight,
        logits.stride(0),
        num_columns,
        ignore_index,
        shaping.scale,
        shaping.softcap,
        shaping.label_smoothing,
        HAS_SOFTCAP=shaping.softcap != 0,
        HAS_SMOOTHING=shaping.label_smoothing != 0,
        HAS_Z=z_weight is not None,
        READ_IGNORED=shaping.reads_ignored_rows,
        WITH_GRADIENT=with_gradient,
        BLOCK_COLUMNS=block,
        num_warps=num_warps_for(block, at_most=MOST_WARPS),
        enable_fp_fusion=False,  # z must be the same number in both passes, or exp(z - lse) drifts
    )


def launch_forward(h: Tensor, weight: Tensor, labels: Tensor, *rest: Any) -> Outputs:
    """Return loss, the divisor left for backward, and the gradients needed, by the kernel."""
    with on_device(h), torch.autocast(h.device.type, enabled=False):
        return run_chunks(_launch_rows, h, weight, labels.contiguous(), *rest)


def launch_backward(
    dloss: Tensor,
    divisor: Tensor,
    dh: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients times dloss / divisor, new tensors of `dtype`, by the kernel."""
    with on_device(divisor):
        dh, dweight, dbias = (
            None if gradient is None else _launch_scale(gradient, dloss, divisor, dtype)
            for gradient in (dh, dweight, dbias)
        )
    return dh, dweight, dbias


def _launch_scale(gradient: Tensor, dloss: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    gradient = gradient.contiguous()
    scaled = gradient.new_empty(gradient.shape, dtype=dtype)
    if gradient.numel():
        launch(
            linear_cross_entropy_backward_kernel,
            (ceil_div(gradient.numel(), SCALE_BLOCK),),
            gradient,
            dloss,
            divisor,
            scaled,
            gradient.numel(),
            BLOCK=SCALE_BLOCK,
            num_warps=8,
            enable_fp_fusion=True,  # one product: nothing to fuse
        )
    return scaled
