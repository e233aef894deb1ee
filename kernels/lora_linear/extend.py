"""Rows with their products with a narrow factor beside them: one read of the rows for both.

A program reads a tile of all columns of its rows, copies it, and multiplies it by the factor; sums stay in registers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import can_launch, ceil_div, jit, next_power_of_two, on_device, tl
from fxopt.kernels.launcher import launch

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)
MOST_RANK = 256
"""The most columns of a factor whose products a program keeps in registers."""
LEAST_RANK = 16
"""Of a product in tiles: fewer columns are filled up."""
FEW_ROWS = 4096
"""Below this, programs of few rows: otherwise most multiprocessors would have none."""


@jit(do_not_specialize=("num_rows",))
def extend_rows_kernel(
    p_rows,
    p_factor,
    p_copy,
    p_products,
    num_rows,
    num_columns,
    rank,
    num_written,
    row_stride,
    factor_stride,
    factor_rank_stride,
    copy_stride,
    products_stride,
    scale,
    COPY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Write scale * rows @ factor, zeros up to `num_written` columns, and a copy of the rows if COPY."""
    b_row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    b_in_rows = b_row < num_rows
    b_rank = tl.arange(0, BLOCK_RANK)[None, :]
    b_sum = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
    for start in range(0, num_columns, BLOCK_COLUMNS):
        b_column = start + tl.arange(0, BLOCK_COLUMNS)
        b_mask = b_in_rows & (b_column < num_columns)[None, :]
        b_rows = tl.load(p_rows + b_row * row_stride + b_column[None, :], mask=b_mask, other=0.0)
        b_factor_at = b_column.to(tl.int64)[:, None] * factor_stride + b_rank * factor_rank_stride
        b_factor_mask = (b_column < num_columns)[:, None] & (b_rank < rank)
        b_factor = tl.load(p_factor + b_factor_at, mask=b_factor_mask, other=0.0)
        if COPY:
            tl.store(p_copy + b_row * copy_stride + b_column[None, :], b_rows, mask=b_mask)
        b_sum = tl.dot(b_rows, b_factor, b_sum)
    b_products = (b_sum * scale).to(p_products.dtype.element_ty)
    tl.store(
        p_products + b_row * products_stride + b_rank, b_products, mask=b_in_rows & (b_rank < num_written)
    )


def tile_of(num_rows: int, rank: int) -> dict[str, Any]:
    """Return the tile of a program: few rows where there are few, so that there are programs enough.

    >>> tile_of(8192, 48)["BLOCK_ROWS"], tile_of(512, 48)["BLOCK_ROWS"]
    (64, 16)
    """
    block_rank = max(next_power_of_two(rank), LEAST_RANK)
    is_small = num_rows < FEW_ROWS
    return dict(
        BLOCK_ROWS=16 if is_small else 64,
        BLOCK_COLUMNS=64 if block_rank > 128 else 128,
        BLOCK_RANK=block_rank,
        num_warps=4 if block_rank <= 64 or (is_small and block_rank <= 128) else 8,
        num_stages=4 if block_rank <= 64 else 3,
    )


def launch_extend(
    rows: Tensor, factor: Tensor, scale: float, copy: Tensor | None, products: Tensor, rank: int
) -> None:
    """Write by the kernel: see `extend_rows`. The rows' last stride is 1."""
    num_rows, num_columns = rows.shape
    num_written = products.shape[1]
    tile = tile_of(num_rows, max(num_written, rank))
    with on_device(rows):
        launch(
            extend_rows_kernel,
            (ceil_div(num_rows, tile["BLOCK_ROWS"]),),
            rows,
            factor,
            products if copy is None else copy,
            products,
            num_rows,
            num_columns,
            rank,
            num_written,
            rows.stride(0),
            *factor.stride(),
            0 if copy is None else copy.stride(0),
            products.stride(0),
            scale,
            COPY=copy is not None,
            enable_fp_fusion=True,  # products are sums of fused multiply-adds anyway
            **tile,
        )


def extend_rows(rows: Tensor, factor: Tensor, scale: float, copy: Tensor | None, products: Tensor) -> None:
    """Write scale * rows @ factor into the first columns of `products`, zeros into the others, and `rows` into `copy`.

    rows: [T, N]; factor: [N, r]; copy: [T, N] or None; products: [T, r or more]; all of one dtype, any row strides.
    """
    rank = factor.shape[1]
    if rows.numel() == 0 or not has_kernel(rows, factor, products):
        if copy is not None:
            copy.copy_(rows)
        torch.addmm(products[:, :rank], rows, factor, beta=0, alpha=scale, out=products[:, :rank])
        products[:, rank:].zero_()
        return
    launch_extend(rows if rows.stride(1) == 1 else rows.contiguous(), factor, scale, copy, products, rank)


def has_kernel(rows: Tensor, factor: Tensor, products: Tensor) -> bool:
    """Return whether narrow products of these run by a kernel: in 16 bits, of ranks that registers hold."""
    fits = rows.dtype in SIXTEEN_BITS and max(factor.shape[1], products.shape[1]) <= MOST_RANK
    return fits and rows.is_cuda and can_launch(rows, factor) and _has_registers(rows.device)


@functools.cache
def _has_registers(device: torch.device) -> bool:
    """Return whether tiles fit: before 8.0 their products would take all memory for their stack."""
    return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
