"""A gated unit's value as longer rows: beside it its products with a narrow factor, all by one read of gate and up.

The layer behind the unit multiplies such rows (`extended`). A program computes all columns of its rows, a tile at a
time, writes the tile and multiplies it by the factor; sums stay in registers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxopt.kernels.activations import act_forward
from fxopt.kernels.glu.form import Form as Unit
from fxopt.kernels.glu.kernels import enter_tile
from fxopt.kernels.launch import ceil_div, jit, next_power_of_two, on_device, tl
from fxopt.kernels.launcher import launch
from fxopt.kernels.lora_linear.extend import FEW_ROWS, LEAST_RANK, MOST_RANK, has_kernel
from fxopt.kernels.lora_linear.extended import padded


@jit(do_not_specialize=("num_rows",))
def gated_rows_kernel(
    p_gate,
    p_up,
    p_factor,
    p_copy,
    p_products,
    num_rows,
    num_columns,
    rank,
    num_written,
    gate_row_stride,
    up_row_stride,
    factor_stride,
    factor_rank_stride,
    copy_stride,
    products_stride,
    product_scale,
    alpha,
    gate_scale,
    gate_limit,
    up_limit,
    up_offset,
    scale,
    ACT: tl.constexpr,
    HAS_GATE_SCALE: tl.constexpr,
    HAS_UP_OFFSET: tl.constexpr,
    HAS_GATE_LIMIT: tl.constexpr,
    HAS_UP_LIMIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_WRITTEN: tl.constexpr,
):
    """Write the unit of these rows, product_scale * unit @ factor, and zeros up to `num_written` columns."""
    b_row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    b_in_rows = b_row < num_rows
    b_rank = tl.arange(0, BLOCK_RANK)[None, :]
    b_sum = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
    for start in range(0, num_columns, BLOCK_COLUMNS):
        b_column = start + tl.arange(0, BLOCK_COLUMNS)
        b_mask = b_in_rows & (b_column < num_columns)[None, :]
        b_gate = tl.load(p_gate + b_row * gate_row_stride + b_column[None, :], mask=b_mask, other=0.0)
        b_up = tl.load(p_up + b_row * up_row_stride + b_column[None, :], mask=b_mask, other=0.0)
        b_factor_at = b_column.to(tl.int64)[:, None] * factor_stride + b_rank * factor_rank_stride
        b_factor_mask = (b_column < num_columns)[:, None] & (b_rank < rank)
        b_factor = tl.load(p_factor + b_factor_at, mask=b_factor_mask, other=0.0)
        b_entered, b_lifted = enter_tile(
            b_gate.to(tl.float32),
            b_up.to(tl.float32),
            gate_scale,
            gate_limit,
            up_limit,
            up_offset,
            HAS_GATE_SCALE,
            HAS_UP_OFFSET,
            HAS_GATE_LIMIT,
            HAS_UP_LIMIT,
        )
        b_unit = (act_forward(b_entered, alpha, ACT) * b_lifted * scale).to(p_copy.dtype.element_ty)
        tl.store(p_copy + b_row * copy_stride + b_column[None, :], b_unit, mask=b_mask)
        b_sum = tl.dot(b_unit, b_factor, b_sum)
    b_products = (b_sum * product_scale).to(p_products.dtype.element_ty)
    tl.store(p_products + b_row * products_stride + b_rank, b_products, mask=b_in_rows & (b_rank < rank))
    b_written = tl.arange(0, BLOCK_WRITTEN)[None, :]
    b_zeros = tl.zeros((BLOCK_ROWS, BLOCK_WRITTEN), dtype=p_products.dtype.element_ty)
    b_is_behind = (b_written >= rank) & (b_written < num_written)
    tl.store(p_products + b_row * products_stride + b_written, b_zeros, mask=b_in_rows & b_is_behind)


def tile_of(rank: int) -> dict[str, Any]:
    """Return the tile of a program for factors of `rank` columns.

    With 8192 x 18944 and a rank of 16, 0.249 ms on an H200, where the unit alone takes 0.217 and its product 0.086;
    64 rows take 0.32.

    >>> tile_of(48)["BLOCK_RANK"]
    64
    """
    block_rank = max(next_power_of_two(rank), LEAST_RANK)
    return dict(
        BLOCK_ROWS=32,
        BLOCK_COLUMNS=64 if block_rank > 64 else 128,
        BLOCK_RANK=block_rank,
        num_warps=8,
        num_stages=3,
    )


def writes_rows_once(gate: Tensor, up: Tensor, factor: Tensor) -> bool:
    """Return whether the kernel can run; of few rows there are not programs enough for it.

    gate, up: [T, N]; factor: [N, r].
    """
    fits = gate.dtype == up.dtype and gate.stride(1) == up.stride(1) == 1 and gate.shape[0] >= FEW_ROWS
    return fits and padded(factor.shape[1]) <= MOST_RANK and has_kernel(gate, factor, factor)


def launch_gated_rows(
    gate: Tensor, up: Tensor, unit: Unit, factor: Tensor, product_scale: float, longer: Tensor
) -> None:
    """Write the unit into the first columns of `longer`, product_scale * unit @ factor behind it, then zeros.

    gate, up: [T, N], last strides 1; of `unit` the two lie apart; factor: [N, r]; longer: [T, N + r or more].
    """
    num_rows, num_columns = gate.shape
    products = longer[:, num_columns:]
    rank, num_written = factor.shape[1], products.shape[1]
    tile = tile_of(rank)
    constants = unit.constants()
    with on_device(gate):
        launch(
            gated_rows_kernel,
            (ceil_div(num_rows, tile["BLOCK_ROWS"]),),
            gate,
            up,
            factor,
            longer,
            products,
            num_rows,
            num_columns,
            rank,
            num_written,
            gate.stride(0),
            up.stride(0),
            *factor.stride(),
            longer.stride(0),
            products.stride(0),
            product_scale,
            *unit.rounded(gate, up).numbers(),
            ACT=constants["ACT"],
            HAS_GATE_SCALE=constants["HAS_GATE_SCALE"],
            HAS_UP_OFFSET=constants["HAS_UP_OFFSET"],
            HAS_GATE_LIMIT=constants["HAS_GATE_LIMIT"],
            HAS_UP_LIMIT=constants["HAS_UP_LIMIT"],
            enable_fp_fusion=True,  # as in the unit's own kernels and in narrow products
            BLOCK_WRITTEN=next_power_of_two(num_written),
            **tile,
        )
