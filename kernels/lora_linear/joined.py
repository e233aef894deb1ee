"""A dense weight as longer rows, with a factor beside it: [W | 0 | F | 0], by one kernel.

torch copies rows into longer ones one item at a time, which takes 2.6 times as long as the bytes do (18944 x 3584 in
bfloat16 on an H200: 0.176 ms, where this kernel takes 0.066).
"""

from __future__ import annotations

from torch import Tensor

from fxopt.kernels.launch import can_launch, ceil_div, jit, next_power_of_two, on_device, tl
from fxopt.kernels.launcher import launch

MOST_COLUMNS = 4096
"""Columns of a program."""
ELEMENTS_PER_THREAD = 16
WARP = 32


@jit(do_not_specialize=("tail_start",))
def join_rows_kernel(
    p_rows,
    p_tail,
    p_out,
    num_columns,
    num_written,
    tail_start,
    rank,
    row_stride,
    tail_row_stride,
    tail_rank_stride,
    out_row_stride,
    BLOCK: tl.constexpr,
):
    """Write BLOCK columns of one row: those of the row, then zeros with the tail's from `tail_start` on."""
    row = tl.program_id(0).to(tl.int64)
    b_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_rows = tl.load(p_rows + row * row_stride + b_column, mask=b_column < num_columns, other=0.0)
    b_rank = b_column - tail_start
    b_tail = tl.load(
        p_tail + row * tail_row_stride + b_rank.to(tl.int64) * tail_rank_stride,
        mask=(b_rank >= 0) & (b_rank < rank),
        other=0.0,
    )
    b_out = tl.where(b_column < num_columns, b_rows, b_tail)
    tl.store(p_out + row * out_row_stride + b_column, b_out, mask=b_column < num_written)


def num_warps_of(block: int) -> int:
    """Return the warps of a program.

    >>> num_warps_of(4096), num_warps_of(64)
    (8, 1)
    """
    return max(1, min(8, block // (WARP * ELEMENTS_PER_THREAD)))


def join_rows(out: Tensor, rows: Tensor, tail: Tensor | None, tail_start: int) -> None:
    """Write `rows` into the first columns of `out`, `tail` beside them from `tail_start` on, zeros elsewhere.

    out: [N, K + n]; rows: [N, K]; tail: [N, r] or None, r + tail_start at most n; any strides. Without a tail, in
    several dtypes or with items of a row apart, and where no kernel can run, torch copies.
    """
    width = rows.shape[1]
    rest = out[:, width:]
    fits = out.stride(1) == 1 == rows.stride(1) and out.dtype == rows.dtype
    if tail is None or not (fits and tail.dtype == out.dtype and out.is_cuda and can_launch(out, rows, tail)):
        out[:, :width].copy_(rows)
        if tail is None or tail.shape[1] < rest.shape[1]:
            rest.zero_()
        if tail is not None:
            rest[:, tail_start : tail_start + tail.shape[1]].copy_(tail)
        return
    launch_join(out, rows, tail, tail_start)


def launch_join(out: Tensor, rows: Tensor, tail: Tensor, tail_start: int) -> None:
    """Write by the kernel: see `join_rows`. Last strides of `out` and `rows` are 1."""
    num_rows, num_written = out.shape
    block = min(next_power_of_two(num_written), MOST_COLUMNS)
    with on_device(out):
        launch(
            join_rows_kernel,
            (num_rows, ceil_div(num_written, block)),
            rows,
            tail,
            out,
            rows.shape[1],
            num_written,
            rows.shape[1] + tail_start,
            tail.shape[1],
            rows.stride(0),
            *tail.stride(),
            out.stride(0),
            BLOCK=block,
            num_warps=num_warps_of(block),
            enable_fp_fusion=False,
        )
