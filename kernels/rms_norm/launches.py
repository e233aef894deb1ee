"""How the kernels are launched: tiles, programs, warps and stages."""

import functools

import torch
from torch import Tensor

from fxopt.kernels.launch import (
    MOST_WARPS,
    ceil_div,
    next_power_of_two,
    num_processors,
    num_stages_for,
    num_warps_for,
    on_device,
    with_row_stride,
)
from fxopt.kernels.launcher import launch
from fxopt.kernels.rms_norm.backward_kernel import rms_norm_backward_kernel, rms_norm_sum_kernel
from fxopt.kernels.rms_norm.forward_kernel import rms_norm_forward_kernel
from fxopt.kernels.rms_norm.reference import promoted

MOST_TILE_COLUMNS = 16384  # longer rows go through in tiles
TILE_ELEMENTS = 4096  # what a program holds at a time, unless one row is longer
FORWARD_ELEMENTS = 32  # a thread's, where forward reads one tensor: fewer warps meet at a row's sum
MOST_FORWARD_WARPS = 8  # where forward reads one tensor: of 16384 columns two programs then fit
FORWARD_ELEMENTS_BESIDE = 16  # a thread's, of each of two
MOST_EARLY_COLUMNS = 4096  # up to here weight and bias are on their way while the sums are made
LEAST_WIDE_COLUMNS, MOST_WIDE_COLUMNS = 257, 2048  # rows of which backward's threads hold 32 values each
SUM_ROWS = 64
SUM_COLUMNS = 16  # many programs of a few columns each: partial sums are few, and all of them wait
LOOP_COLUMNS = 4096
MOST_KEPT_COLUMNS = 8192  # backward holds the weight in registers; of longer rows it reads it again for each


@functools.cache
def tile_of(width: int, elements: int) -> tuple[int, int]:
    """Return BLOCK_ROWS and BLOCK_COLUMNS for rows of `width`."""
    columns = next_power_of_two(width)
    if columns > MOST_TILE_COLUMNS:
        return 1, LOOP_COLUMNS
    return max(1, elements // max(columns, 64)), columns


@functools.cache
def backward_tiles_of(width: int, *, gated: bool) -> tuple[tuple[int, int, int, int], ...]:
    """Return BLOCK_ROWS, BLOCK_COLUMNS, warps and stages for rows of `width`, then those for where these do not fit.

    By what an H200 takes for 8192 rows. 32 values a thread in place of 16: rows of 768 20 us in place of 24, gated ones
    29 in place of 45; rows of 128 take longer, and of 4096 but for gated ones (97 us in place of 103). Where no column
    is masked, in tiles of half the rows: 1024 22 us in place of 26.
    """
    rows, columns = tile_of(width, TILE_ELEMENTS)
    tiles = [(rows, columns, num_warps_for(rows * columns), 3)]
    if LEAST_WIDE_COLUMNS <= width <= (2 if gated else 1) * MOST_WIDE_COLUMNS:
        is_filled = width == columns <= MOST_WIDE_COLUMNS
        rows = rows // 2 if is_filled else rows
        tiles.insert(0, (rows, columns, num_warps_for(rows * columns, 32), 4 if is_filled else 3))
    return tuple(tiles)


@functools.cache
def plan_backward(
    width: int, value_bytes: int, row_bytes: int, device: torch.device, *, gated: bool
) -> tuple[int, int, int]:
    """Return BLOCK_ROWS, warps and stages; a turn of the loop loads so much for each value of its tile, and once."""
    planned: list[tuple[int, int, int]] = []
    for rows, columns, warps, most_stages in backward_tiles_of(width, gated=gated):
        loop_bytes = rows * columns * value_bytes + row_bytes
        stages = num_stages_for(loop_bytes, device, most_stages) if width <= columns else 1
        planned.append((rows, warps, stages))
    fitting = (tile for tile in planned if tile[-1] > 1)
    return next(fitting, planned[0] if device.type == "cpu" else planned[-1])


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
    y = x.new_empty(x.shape, dtype=out_dtype or promoted(x, weight))
    statistics = run_forward(
        x, None, weight, gate, None, y, 1.0, eps, offset, cast_first, centre, gate_act, gate_before, groups
    )
    return y, statistics


def run_forward(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    h: Tensor | None,
    y: Tensor,
    scale: float,
    eps: float,
    offset: float,
    cast_first: bool,
    centre: bool,
    gate_act: str,
    gate_before: bool,
    groups: int,
) -> Tensor:
    """Write `y`, with a skip `h` as well, and return the statistics."""
    columns = x.shape[-1]
    num_rows = x.numel() // columns
    statistics = x.new_empty((2 if centre else 1, num_rows * groups), dtype=torch.float32)
    if num_rows == 0:
        return statistics
    width = columns // groups
    block_rows, block_columns = tile_of(width, TILE_ELEMENTS)
    reads_one = gate is None and h is None
    per_thread = FORWARD_ELEMENTS if reads_one else FORWARD_ELEMENTS_BESIDE
    most_warps = MOST_FORWARD_WARPS if reads_one else MOST_WARPS
    x, x_row_stride = with_row_stride(x)
    skip, skip_row_stride = (x, 0) if skip is None else with_row_stride(skip)
    gate, gate_row_stride = (None, 0) if gate is None else with_row_stride(gate)
    with on_device(x):
        launch(
            rms_norm_forward_kernel,
            (ceil_div(num_rows, block_rows), groups),
            x,
            skip,
            x if weight is None else weight.contiguous(),
            x if gate is None else gate,
            x if h is None else h,
            y,
            statistics,
            x_row_stride,
            skip_row_stride,
            gate_row_stride,
            num_rows,
            scale,
            eps,
            offset,
            WIDTH=width,
            GROUPS=groups,
            HAS_SKIP=h is not None,
            HAS_WEIGHT=weight is not None,
            GATE="" if gate is None else gate_act,
            GATE_BEFORE=gate_before,
            CAST_FIRST=cast_first,
            CENTRE=centre,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            EARLY=not reads_one or block_columns <= MOST_EARLY_COLUMNS,
            num_warps=num_warps_for(block_rows * block_columns, per_thread, most_warps),
            # Sums of squares, x * scale + skip, n * w * act: a fused multiply-add only rounds less.
            enable_fp_fusion=True,
        )
    return statistics


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
    dskip: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x (with `dskip` added), weight and gate that are needed, by the kernel."""
    dx = x.new_empty(x.shape) if need_x else None
    dgate = gate.new_empty(gate.shape) if need_gate and gate is not None else None
    dweight = run_backward(
        dy, x, weight, gate, statistics, dskip, dx, None, dgate,
        1.0, offset, centre, gate_act, gate_before, groups, need_weight,
    )  # fmt: skip
    return dx, dweight, dgate


def run_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    statistics: Tensor,
    dh: Tensor | None,
    dx: Tensor | None,
    dskip: Tensor | None,
    dgate: Tensor | None,
    scale: float,
    offset: float,
    centre: bool,
    gate_act: str,
    gate_before: bool,
    groups: int,
    need_weight: bool,
) -> Tensor | None:
    """Write the gradients given as `dx`, `dskip` and `dgate`, and return that of weight where needed."""
    columns = x.shape[-1]
    num_rows = x.numel() // columns
    dweight = weight.new_empty(weight.shape) if need_weight and weight is not None else None
    if num_rows == 0:
        return None if dweight is None else dweight.zero_()
    width = columns // groups
    _, block_columns = tile_of(width, TILE_ELEMENTS)
    keep_weight = block_columns <= MOST_KEPT_COLUMNS
    per_processor = 1 if block_columns > TILE_ELEMENTS else 2
    read = (dy, x, gate, dh)
    value_bytes = sum(tensor.element_size() for tensor in read if tensor is not None)
    weight_bytes = 0
    if weight is not None and not keep_weight and dh is None:
        weight_bytes = block_columns * weight.element_size()
    block_rows, num_warps, stages = plan_backward(
        width, per_processor * value_bytes, per_processor * weight_bytes, x.device, gated=gate is not None
    )
    programs = max(1, num_processors(x.device) * per_processor // groups)
    programs = min(programs, ceil_div(num_rows, block_rows))
    partial = None if dweight is None else x.new_empty((programs, columns), dtype=torch.float32)
    x, x_row_stride = with_row_stride(x)
    dy, dy_row_stride = with_row_stride(dy)
    gate, gate_row_stride = (None, 0) if gate is None else with_row_stride(gate)
    dh, dh_row_stride = (None, 0) if dh is None else with_row_stride(dh)
    with on_device(x):
        launch(
            rms_norm_backward_kernel,
            (programs, groups),
            dy,
            x,
            x if weight is None else weight.contiguous(),
            x if gate is None else gate,
            statistics,
            x if dh is None else dh,
            x if dx is None else dx,
            x if dskip is None else dskip,
            statistics if partial is None else partial,
            x if dgate is None else dgate,
            dy_row_stride,
            x_row_stride,
            gate_row_stride,
            dh_row_stride,
            num_rows,
            scale,
            offset,
            WIDTH=width,
            GROUPS=groups,
            HAS_WEIGHT=weight is not None,
            GATE="" if gate is None else gate_act,
            GATE_BEFORE=gate_before,
            CENTRE=centre,
            HAS_DH=dh is not None,
            NEED_X=dx is not None,
            NEED_SKIP=dskip is not None,
            NEED_WEIGHT=dweight is not None,
            NEED_GATE=dgate is not None,
            KEEP_WEIGHT=keep_weight,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            STAGES=stages,
            num_warps=num_warps,
            enable_fp_fusion=True,  # products and sums of fp32 values: a fused multiply-add only rounds less
        )
        if dweight is not None:
            launch(
                rms_norm_sum_kernel,
                (ceil_div(columns, SUM_COLUMNS),),
                partial,
                dweight,
                programs,
                columns,
                BLOCK_ROWS=SUM_ROWS,
                BLOCK_COLUMNS=SUM_COLUMNS,
                num_warps=4,
                enable_fp_fusion=True,  # sums only: nothing to fuse
            )
    return dweight
