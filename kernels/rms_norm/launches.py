"""How the kernels are launched: tiles, programs, warps and stages."""

import functools

import torch
from torch import Tensor

from fxopt.kernels.launch import (
    as_rows,
    ceil_div,
    next_power_of_two,
    num_processors,
    num_stages_for,
    num_warps_for,
    on_device,
)
from fxopt.kernels.rms_norm.kernels import (
    rms_norm_backward_kernel,
    rms_norm_forward_kernel,
    rms_norm_sum_kernel,
)
from fxopt.kernels.rms_norm.reference import promoted

MOST_TILE_COLUMNS = 16384  # longer rows go through in tiles
TILE_ELEMENTS = 4096  # what a program holds at a time, unless one row is longer
LOOP_COLUMNS = 4096
MOST_KEPT_COLUMNS = 8192  # backward holds the weight in registers; of longer rows it reads it again for each


@functools.cache
def tile_of(width: int, elements: int) -> tuple[int, int]:
    """Return BLOCK_ROWS and BLOCK_COLUMNS for rows of `width`."""
    columns = next_power_of_two(width)
    if columns > MOST_TILE_COLUMNS:
        return 1, LOOP_COLUMNS
    return max(1, elements // max(columns, 64)), columns


def launch_forward(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    centre: bool,
    gate_act: str,
    gate_before: bool,
    groups: int,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return y and the statistics, by the kernel."""
    x_rows = as_rows(x)
    num_rows, columns = x_rows.shape
    gate_rows = x_rows if gate is None else as_rows(gate)
    y = x.new_empty(x.shape, dtype=out_dtype or promoted(x, weight))
    statistics = x.new_empty((2 if centre else 1, num_rows * groups), dtype=torch.float32)
    if num_rows == 0:
        return y, statistics
    width = columns // groups
    block_rows, block_columns = tile_of(width, TILE_ELEMENTS)
    with on_device(x):
        rms_norm_forward_kernel[(ceil_div(num_rows, block_rows), groups)](
            x_rows,
            x_rows if weight is None else weight.contiguous(),
            gate_rows,
            y,
            statistics,
            x_rows.stride(0),
            gate_rows.stride(0),
            num_rows,
            eps,
            offset,
            WIDTH=width,
            GROUPS=groups,
            HAS_WEIGHT=weight is not None,
            GATE="" if gate is None else gate_act,
            GATE_BEFORE=gate_before,
            CAST_FIRST=cast_first,
            CENTRE=centre,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=num_warps_for(block_rows * block_columns),
            enable_fp_fusion=True,  # sums of squares and n * w * act: a fused multiply-add only rounds less
        )
    return y, statistics


def launch_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    statistics: Tensor,
    offset: float,
    centre: bool,
    gate_act: str,
    gate_before: bool,
    groups: int,
    need_x: bool,
    need_weight: bool,
    need_gate: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and gate that are needed, by the kernel."""
    dy_rows, x_rows = as_rows(dy), as_rows(x)
    num_rows, columns = x_rows.shape
    gate_rows = x_rows if gate is None else as_rows(gate)
    dx = x.new_empty(x.shape) if need_x else None
    dgate = gate.new_empty(gate.shape) if need_gate and gate is not None else None
    dweight = weight.new_empty(weight.shape) if need_weight and weight is not None else None
    if num_rows == 0:
        return dx, None if dweight is None else dweight.zero_(), dgate
    width = columns // groups
    block_rows, block_columns = tile_of(width, TILE_ELEMENTS)
    tile_elements = block_rows * block_columns
    per_processor = 1 if tile_elements > TILE_ELEMENTS else 2
    programs = max(1, num_processors(x.device) * per_processor // groups)
    programs = min(programs, ceil_div(num_rows, block_rows))
    keep_weight = block_columns <= MOST_KEPT_COLUMNS
    tile_bytes = tile_elements * sum(tensor.element_size() for tensor in (dy, x, gate) if tensor is not None)
    if weight is not None and not keep_weight:
        tile_bytes += block_columns * weight.element_size()
    partial = None if dweight is None else x.new_empty((programs, columns), dtype=torch.float32)
    with on_device(x):
        rms_norm_backward_kernel[(programs, groups)](
            dy_rows,
            x_rows,
            x_rows if weight is None else weight.contiguous(),
            gate_rows,
            statistics,
            x_rows if dx is None else dx,
            statistics if partial is None else partial,
            x_rows if dgate is None else dgate,
            dy_rows.stride(0),
            x_rows.stride(0),
            gate_rows.stride(0),
            num_rows,
            offset,
            WIDTH=width,
            GROUPS=groups,
            HAS_WEIGHT=weight is not None,
            GATE="" if gate is None else gate_act,
            GATE_BEFORE=gate_before,
            CENTRE=centre,
            NEED_X=need_x,
            NEED_WEIGHT=dweight is not None,
            NEED_GATE=dgate is not None,
            KEEP_WEIGHT=keep_weight,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            STAGES=num_stages_for(tile_bytes * per_processor, x.device) if width <= block_columns else 1,
            num_warps=num_warps_for(tile_elements),
            enable_fp_fusion=True,  # products and sums of fp32 values: a fused multiply-add only rounds less
        )
        if dweight is not None:
            block = 64
            rms_norm_sum_kernel[(ceil_div(columns, block),)](
                partial,
                dweight,
                programs,
                columns,
                BLOCK_ROWS=64,
                BLOCK_COLUMNS=block,
                num_warps=8,
                enable_fp_fusion=True,  # sums only: nothing to fuse
            )
    return dx, dweight, dgate
