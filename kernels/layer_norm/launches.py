"""How the kernels are launched: tiles, programs, warps and stages."""

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import (
    ceil_div,
    num_processors,
    num_stages_for,
    num_warps_for,
    on_device,
    with_row_stride,
)
from fxopt.kernels.launcher import launch
from fxopt.kernels.layer_norm.kernels import (
    layer_norm_backward_kernel,
    layer_norm_forward_kernel,
    layer_norm_sum_kernel,
)
from fxopt.kernels.layer_norm.long_rows import layer_norm_long_backward_kernel
from fxopt.kernels.rms_norm.launches import (
    FORWARD_ELEMENTS,
    MOST_EARLY_COLUMNS,
    MOST_FORWARD_WARPS,
    SUM_COLUMNS,
    SUM_ROWS,
    TILE_ELEMENTS,
    tile_of,
)

MOST_KEPT_COLUMNS = 8192  # of a row and the weight, in registers; longer rows go in pieces, or are read again
LONG_PIECES, LONG_WARPS = 8, 16
LONG_MULTIPLE = 16
"""Columns and strides of rows that go in pieces: of others Triton reads value by value, each into a register."""


def launch_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return y and the statistics, by the kernel."""
    columns = x.shape[-1]
    num_rows = x.numel() // columns
    y = x.new_empty(x.shape, dtype=out_dtype or x.dtype)
    statistics = x.new_empty((2, num_rows), dtype=torch.float32)
    if num_rows == 0:
        return y, statistics
    block_rows, block_columns = tile_of(columns, TILE_ELEMENTS)
    num_warps = num_warps_for(block_rows * block_columns, FORWARD_ELEMENTS, MOST_FORWARD_WARPS)
    x, x_row_stride = with_row_stride(x)
    with on_device(x):
        launch(
            layer_norm_forward_kernel,
            (ceil_div(num_rows, block_rows),),
            x,
            x if weight is None else weight.contiguous(),
            x if bias is None else bias.contiguous(),
            y,
            statistics,
            x_row_stride,
            num_rows,
            eps,
            WIDTH=columns,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            EARLY=block_columns <= MOST_EARLY_COLUMNS,
            num_warps=num_warps,
            enable_fp_fusion=True,  # sums of squares and n * w + b: a fused multiply-add only rounds less
        )
    return y, statistics


def backward_tile_of(width: int) -> tuple[int, int, int, int]:
    """Return BLOCK_ROWS, BLOCK_COLUMNS, warps and stages for rows of `width`, the fastest of those tried on an H200.

    Of 8192 rows of 1024 values 23 us, where 4 rows by 8 warps in 3 stages take 36; rows of 128 the other way round.
    Above 1024 one stage more is up to 6 % faster; so are more warps, but not where columns are masked.
    """
    if 256 < width <= 2048:
        rows, columns = tile_of(width, 2048)
        per_thread = 16 if width == 2048 else 32
        return rows, columns, num_warps_for(rows * columns, per_thread), 5 if width > 1024 else 4
    rows, columns = tile_of(width, TILE_ELEMENTS)
    return rows, columns, num_warps_for(rows * columns), 3


def launch_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias that are needed, by the kernel."""
    columns = x.shape[-1]
    num_rows = x.numel() // columns
    dx = x.new_empty(x.shape) if need_x else None
    dweight = weight.new_empty(weight.shape) if need_weight and weight is not None else None
    dbias = bias.new_empty(bias.shape) if need_bias and bias is not None else None
    if num_rows == 0:
        return dx, None if dweight is None else dweight.zero_(), None if dbias is None else dbias.zero_()
    block_rows, block_columns, num_warps, stages = backward_tile_of(columns)
    tile_elements = block_rows * block_columns
    per_processor = 1 if tile_elements > TILE_ELEMENTS else 2
    programs = min(num_processors(x.device) * per_processor, ceil_div(num_rows, block_rows))
    keep = block_columns <= MOST_KEPT_COLUMNS
    tile_bytes = tile_elements * (dy.element_size() + x.element_size())
    if weight is not None and not keep:
        tile_bytes += block_columns * weight.element_size()
    num_sums = (dweight is not None) + (dbias is not None)
    partial = x.new_empty((2, programs, columns), dtype=torch.float32) if num_sums else statistics
    x, x_row_stride = with_row_stride(x)
    dy, dy_row_stride = with_row_stride(dy)
    in_pieces = (
        not keep
        and num_sums > 0
        and columns <= block_columns
        and not any(size % LONG_MULTIPLE for size in (columns, x_row_stride, dy_row_stride))
        and dy.element_size() == x.element_size() == 2
    )
    arguments = (
        dy,
        x,
        x if weight is None else weight.contiguous(),
        statistics,
        x if dx is None else dx,
        partial,
        dy_row_stride,
        x_row_stride,
        num_rows,
    )
    needs = {
        "HAS_WEIGHT": weight is not None,
        "NEED_X": need_x,
        "NEED_WEIGHT": dweight is not None,
        "NEED_BIAS": dbias is not None,
    }
    kernel: Any = layer_norm_backward_kernel
    form = {
        "KEEP_WEIGHT": keep,
        "RELOAD": not keep and num_sums > 0,
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
        "STAGES": 1,
    }
    if columns <= block_columns:
        form["STAGES"] = num_stages_for(tile_bytes * per_processor, x.device, stages)
    if in_pieces:
        kernel, num_warps = layer_norm_long_backward_kernel, LONG_WARPS
        form = {"BLOCK_COLUMNS": block_columns, "PIECES": LONG_PIECES}
    with on_device(x):
        launch(
            kernel,
            (programs,),
            *arguments,
            WIDTH=columns,
            **needs,
            **form,
            num_warps=num_warps,
            enable_fp_fusion=False,  # a fused multiply-add would make a difference of equal products not 0
        )
        if num_sums:
            launch(
                layer_norm_sum_kernel,
                (ceil_div(columns, SUM_COLUMNS), num_sums),
                partial,
                partial if dweight is None else dweight,
                partial if dbias is None else dbias,
                programs,
                columns,
                NEED_WEIGHT=dweight is not None,
                NEED_BIAS=dbias is not None,
                BLOCK_ROWS=SUM_ROWS,
                BLOCK_COLUMNS=SUM_COLUMNS,
                num_warps=4,
                enable_fp_fusion=True,  # sums only: nothing to fuse
            )
    return dx, dweight, dbias
