"""Two narrow products of one wide matrix in one read of it: scale M F over columns, scale M^T L over rows.

Of a gradient dY these are scale dY B and the gradient of B, L being x A^T; of an input x they are x A^T and the
gradient of A, L being scale dY B.

A program multiplies a tile of all its rows by both factors for each column tile of its group. What it has of a sum over
all columns, or all rows, is written in fp32 and added in a fixed order by a second kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.kernels.launch import ceil_div, jit, next_power_of_two, on_device, tl
from fxopt.kernels.launcher import launch
from fxopt.kernels.lora_linear.extend import LEAST_RANK, has_kernel

BLOCK_ROWS = 256
BLOCK_COLUMNS = 64
COLUMN_GROUPS = 8
"""Of 8192 rows that makes 256 programs, two on each multiprocessor of an H100."""
NUM_WARPS = 8
NUM_STAGES = 3
MOST_RANK = 32
SUM_BLOCK = 1024
LEAST_BYTES = 64 * 2**20
"""Of a smaller matrix the second read costs less than three launches do."""


@jit
def narrow_products_kernel(
    p_rows,
    p_factor,
    p_left,
    p_outer,
    p_sums,
    num_rows,
    num_columns,
    num_group_columns,
    rank,
    row_stride,
    left_row_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Write of rows @ factor what the group's columns add, and of rows^T @ left what these rows add."""
    block = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    b_row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    b_in_rows = b_row < num_rows
    b_rank = tl.arange(0, BLOCK_RANK)[None, :]
    b_in_rank = b_rank < rank
    b_left = tl.load(p_left + b_row * left_row_stride + b_rank, mask=b_in_rows & b_in_rank, other=0.0)
    b_outer = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
    first = group * num_group_columns
    p_sums += block * num_columns * rank
    for start in range(0, num_group_columns, BLOCK_COLUMNS):
        b_column = first + start + tl.arange(0, BLOCK_COLUMNS)
        b_in_columns = b_column < num_columns
        b_rows = tl.load(
            p_rows + b_row * row_stride + b_column[None, :],
            mask=b_in_rows & b_in_columns[None, :],
            other=0.0,
        )
        b_at = b_column[:, None] * rank + b_rank
        b_mask = b_in_columns[:, None] & b_in_rank
        b_factor = tl.load(p_factor + b_at, mask=b_mask, other=0.0)
        b_outer = tl.dot(b_rows, b_factor, b_outer)
        tl.store(p_sums + b_at, tl.dot(tl.trans(b_rows), b_left), mask=b_mask)
    p_outer += group * num_rows * rank
    tl.store(p_outer + b_row * rank + b_rank, b_outer, mask=b_in_rows & b_in_rank)


@jit
def narrow_sum_kernel(
    p_parts,
    p_out,
    num_parts,
    num_items,
    rank,
    out_row_stride,
    scale,
    BLOCK: tl.constexpr,
):
    """Write scale * the sum of BLOCK items over all parts, in their order."""
    b_at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_mask = b_at < num_items
    b_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(num_parts):
        b_sum += tl.load(p_parts + b_at, mask=b_mask, other=0.0)
        p_parts += num_items
    b_out = (b_sum * scale).to(p_out.dtype.element_ty)
    tl.store(p_out + b_at // rank * out_row_stride + b_at % rank, b_out, mask=b_mask)


def reads_once(rows: Tensor, factor: Tensor, left: Tensor) -> bool:
    """Return whether one read saves more than what the sums' parts move, and the kernels can run."""
    saved = rows.numel() * rows.element_size()
    parts = parts_bytes(rows, factor.shape[1])
    fits = factor.shape[1] <= MOST_RANK and rows.stride(1) == 1 and left.stride(1) == 1
    fits = fits and rows.dtype == factor.dtype == left.dtype  # wider adapters go through torch's products
    return fits and saved >= LEAST_BYTES and 2 * parts < saved and has_kernel(rows, factor, left)


def parts_bytes(rows: Tensor, rank: int, block_rows: int = BLOCK_ROWS, groups: int = COLUMN_GROUPS) -> int:
    """Return the bytes of the parts of one pair of narrow products of `rows`, of programs of `block_rows`."""
    return 4 * rank * (ceil_div(rows.shape[0], block_rows) * rows.shape[1] + groups * rows.shape[0])


def launch_narrow_products(rows: Tensor, factor: Tensor, left: Tensor, scale: float, outer: Tensor) -> Tensor:
    """Write scale * rows @ factor to `outer`, and return scale * rows^T @ left in the factor's dtype.

    rows: [T, N]; factor: [N, r]; left, outer: [T, r]; last strides are 1.
    """
    (num_rows, num_columns), rank = rows.shape, factor.shape[1]
    factor = factor.contiguous()
    blocks = ceil_div(num_rows, BLOCK_ROWS)
    columns = ceil_div(ceil_div(num_columns, COLUMN_GROUPS), BLOCK_COLUMNS) * BLOCK_COLUMNS
    groups = ceil_div(num_columns, columns)
    outer_parts = rows.new_empty((groups, num_rows, rank), dtype=torch.float32)
    sum_parts = rows.new_empty((blocks, num_columns, rank), dtype=torch.float32)
    sums = factor.new_empty((num_columns, rank))
    with on_device(rows):
        launch(
            narrow_products_kernel,
            (blocks, groups),
            rows,
            factor,
            left,
            outer_parts,
            sum_parts,
            num_rows,
            num_columns,
            columns,
            rank,
            rows.stride(0),
            left.stride(0),
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            BLOCK_RANK=max(next_power_of_two(rank), LEAST_RANK),
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
            enable_fp_fusion=True,  # products are sums of fused multiply-adds anyway
        )
        launch_narrow_sum(outer_parts, outer, scale)
        launch_narrow_sum(sum_parts, sums, scale)
    return sums


def launch_narrow_sum(parts: Tensor, out: Tensor, scale: float) -> None:
    """Write scale * the sum of `parts` over its first dimension to `out`, whose last stride is 1."""
    launch(
        narrow_sum_kernel,
        (ceil_div(out.numel(), SUM_BLOCK),),
        parts,
        out,
        parts.shape[0],
        out.numel(),
        out.shape[1],
        out.stride(0),
        scale,
        BLOCK=SUM_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,  # one product behind the sum
    )
