"""A gated unit's gradients, and every narrow product of a layer's backward that reads them or its value, in one read.

A program computes a tile of the unit and of both gradients for each column tile of its group, writes the gradients,
and multiplies all three by the factors of the adapters around the unit, as `one_read` does with one matrix: over
columns (h A^T, dgate B, dup B) and over rows (the gradients of A, of B and of B). The unit itself is never in memory.

Products are computed transposed, the rank their first dimension: a tile is then the right factor of both that it is in,
goes through shared memory once, and instructions of 16 rows fit the rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxopt.kernels.glu.form import Form as Unit
from fxopt.kernels.glu.form import passes_at_limit
from fxopt.kernels.glu.kernels import leave_tile
from fxopt.kernels.launch import ceil_div, jit, next_power_of_two, on_device, tl
from fxopt.kernels.launcher import launch
from fxopt.kernels.lora_linear.extend import LEAST_RANK, has_kernel
from fxopt.kernels.lora_linear.one_read import (
    LEAST_BYTES,
    MOST_RANK,
    launch_narrow_sum,
    parts_bytes,
)

BLOCK_ROWS = 128
"""Fewer rows make more parts of the sums over rows; more take registers that a program does not have."""
COLUMN_GROUPS = 4
"""Of 8192 rows that makes 256 programs, two for each multiprocessor of an H100, one after the other."""
HOPPER = (9, 0)
NO_GPU = (0, 0)


class Narrow(NamedTuple):
    """What a matrix M of [T, N] is multiplied by, and where scale M F goes."""

    factor: Tensor
    """F, [N, r], any strides."""
    left: Tensor
    """L of scale M^T L, [T, r]."""
    out: Tensor
    """[T, r], last stride 1."""
    scale: float


@jit
def multiply_tile(
    b_tile,
    b_left,
    b_outer,
    p_factor,
    p_sums,
    b_column,
    num_columns,
    rank,
    factor_stride,
    factor_rank_stride,
    BLOCK_RANK: tl.constexpr,
):
    """Return b_outer + (tile @ factor)^T, and write tile^T @ left; b_left, b_outer: [BLOCK_RANK, BLOCK_ROWS]."""
    b_rank = tl.arange(0, BLOCK_RANK)[:, None]
    b_mask = (b_column < num_columns)[None, :] & (b_rank < rank)
    b_factor_at = b_column[None, :] * factor_stride + b_rank * factor_rank_stride
    b_factor = tl.load(p_factor + b_factor_at, mask=b_mask, other=0.0)
    tl.store(p_sums + b_column[None, :] * rank + b_rank, tl.dot(b_left, b_tile), mask=b_mask)
    return tl.dot(b_factor, tl.trans(b_tile), b_outer)


@jit
def gated_products_kernel(
    p_dy,
    p_gate,
    p_up,
    p_dgate,
    p_dup,
    p_unit_factor,
    p_gate_factor,
    p_up_factor,
    p_unit_left,
    p_gate_left,
    p_up_left,
    p_unit_outer,
    p_gate_outer,
    p_up_outer,
    p_unit_sums,
    p_gate_sums,
    p_up_sums,
    num_rows,
    num_columns,
    num_group_columns,
    unit_rank,
    gate_rank,
    up_rank,
    dy_row_stride,
    gate_row_stride,
    up_row_stride,
    dgate_row_stride,
    dup_row_stride,
    unit_factor_stride,
    unit_factor_rank_stride,
    gate_factor_stride,
    gate_factor_rank_stride,
    up_factor_stride,
    up_factor_rank_stride,
    unit_left_stride,
    gate_left_stride,
    up_left_stride,
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
    PASSES_AT_LIMIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Write the gradients of these rows and columns, and what they add to each narrow product."""
    block = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    first_row = block * BLOCK_ROWS
    # Rows count from the block's first: 32 bits are enough then, and cost fewer registers.
    b_row = tl.arange(0, BLOCK_ROWS)[:, None]
    b_in_rows = b_row < num_rows - first_row
    b_rank = tl.arange(0, BLOCK_RANK)[:, None]
    b_row_across = tl.arange(0, BLOCK_ROWS)[None, :]
    b_across = b_row_across < num_rows - first_row
    b_unit_in = b_across & (b_rank < unit_rank)
    b_gate_in = b_across & (b_rank < gate_rank)
    b_up_in = b_across & (b_rank < up_rank)
    p_unit_left += first_row * unit_left_stride
    p_gate_left += first_row * gate_left_stride
    p_up_left += first_row * up_left_stride
    b_unit_left = tl.load(p_unit_left + b_row_across * unit_left_stride + b_rank, mask=b_unit_in, other=0.0)
    b_gate_left = tl.load(p_gate_left + b_row_across * gate_left_stride + b_rank, mask=b_gate_in, other=0.0)
    b_up_left = tl.load(p_up_left + b_row_across * up_left_stride + b_rank, mask=b_up_in, other=0.0)
    b_unit_outer = tl.zeros((BLOCK_RANK, BLOCK_ROWS), dtype=tl.float32)
    b_gate_outer = tl.zeros((BLOCK_RANK, BLOCK_ROWS), dtype=tl.float32)
    b_up_outer = tl.zeros((BLOCK_RANK, BLOCK_ROWS), dtype=tl.float32)
    p_dy += first_row * dy_row_stride
    p_gate += first_row * gate_row_stride
    p_up += first_row * up_row_stride
    p_dgate += first_row * dgate_row_stride
    p_dup += first_row * dup_row_stride
    p_unit_sums += block * num_columns * unit_rank
    p_gate_sums += block * num_columns * gate_rank
    p_up_sums += block * num_columns * up_rank
    first = tl.program_id(1) * num_group_columns
    for start in range(first, first + num_group_columns, BLOCK_COLUMNS):
        b_column = start + tl.arange(0, BLOCK_COLUMNS)
        b_mask = b_in_rows & (b_column < num_columns)[None, :]
        b_dy = tl.load(p_dy + b_row * dy_row_stride + b_column[None, :], mask=b_mask, other=0.0)
        b_gate = tl.load(p_gate + b_row * gate_row_stride + b_column[None, :], mask=b_mask, other=0.0)
        b_up = tl.load(p_up + b_row * up_row_stride + b_column[None, :], mask=b_mask, other=0.0)
        b_unit, b_dgate, b_dup = leave_tile(
            b_dy.to(tl.float32) * scale,
            b_gate.to(tl.float32),
            b_up.to(tl.float32),
            alpha,
            gate_scale,
            gate_limit,
            up_limit,
            up_offset,
            ACT,
            HAS_GATE_SCALE,
            HAS_UP_OFFSET,
            HAS_GATE_LIMIT,
            HAS_UP_LIMIT,
            PASSES_AT_LIMIT,
            APPROXIMATE=True,
        )
        b_unit_tile = (b_unit * scale).to(b_gate.dtype)
        b_dgate_tile = b_dgate.to(b_gate.dtype)
        b_dup_tile = b_dup.to(b_gate.dtype)
        tl.store(p_dgate + b_row * dgate_row_stride + b_column[None, :], b_dgate_tile, mask=b_mask)
        tl.store(p_dup + b_row * dup_row_stride + b_column[None, :], b_dup_tile, mask=b_mask)
        b_unit_outer = multiply_tile(
            b_unit_tile,
            b_unit_left,
            b_unit_outer,
            p_unit_factor,
            p_unit_sums,
            b_column,
            num_columns,
            unit_rank,
            unit_factor_stride,
            unit_factor_rank_stride,
            BLOCK_RANK,
        )
        b_gate_outer = multiply_tile(
            b_dgate_tile,
            b_gate_left,
            b_gate_outer,
            p_gate_factor,
            p_gate_sums,
            b_column,
            num_columns,
            gate_rank,
            gate_factor_stride,
            gate_factor_rank_stride,
            BLOCK_RANK,
        )
        b_up_outer = multiply_tile(
            b_dup_tile,
            b_up_left,
            b_up_outer,
            p_up_factor,
            p_up_sums,
            b_column,
            num_columns,
            up_rank,
            up_factor_stride,
            up_factor_rank_stride,
            BLOCK_RANK,
        )
    b_at = group * num_rows + first_row + b_row_across
    tl.store(p_unit_outer + b_at * unit_rank + b_rank, b_unit_outer, mask=b_unit_in)
    tl.store(p_gate_outer + b_at * gate_rank + b_rank, b_gate_outer, mask=b_gate_in)
    tl.store(p_up_outer + b_at * up_rank + b_rank, b_up_outer, mask=b_up_in)


def gated_parts_bytes(rows: Tensor, rank: int) -> int:
    """Return the bytes of the parts of one pair of narrow products of `rows`, of the programs here."""
    return parts_bytes(rows, rank, BLOCK_ROWS, COLUMN_GROUPS)


def reads_gated_once(dy: Tensor, gate: Tensor, up: Tensor, narrow: list[Narrow]) -> bool:
    """Return whether the kernel can run, and moves less than the unit and its gradients read one by one."""
    rows = [dy, gate, up]
    ranks = [item.factor.shape[1] for item in narrow]
    fits = all(tensor.stride(1) == 1 for tensor in (*rows, *(item.left for item in narrow)))
    dtypes = {
        tensor.dtype for tensor in (*rows, *(item.factor for item in narrow), *(item.left for item in narrow))
    }
    fits = fits and len(dtypes) == 1 and max(ranks) <= MOST_RANK
    saved = dy.numel() * dy.element_size()
    return (
        fits
        and saved >= LEAST_BYTES
        and 2 * gated_parts_bytes(dy, max(ranks)) < saved
        and has_kernel(dy, *narrow[0][:2])
    )


def tile_of(capability: tuple[int, int], rank: int) -> dict[str, int]:
    """Return the tile of a program for adapters of `rank`: on Hopper the best that was timed, elsewhere one that fits.

    With 8192 x 18944 on an H200 it takes 0.54 ms, without the sums behind it; tiles of 32 columns 0.72 and more,
    two stages 0.69, 16 warps 0.74, 64 rows 0.62. Other GPUs have no memory for three stages of wide tiles (99 KB on
    sm_89), or no registers (sm_100); nor has Hopper for ranks above 16.

    >>> tile_of((9, 0), 16)["BLOCK_COLUMNS"], tile_of((8, 9), 16)["BLOCK_COLUMNS"]
    (64, 32)
    """
    if capability == HOPPER:
        return dict(BLOCK_COLUMNS=64 if rank <= LEAST_RANK else 32, num_warps=8, num_stages=3)
    return dict(BLOCK_COLUMNS=32, num_warps=8, num_stages=2)


def launch_gated_products(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    unit: Unit,
    narrow: list[Narrow],
    memory: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the gradients of gate and up, and scale M^T L for M each of the unit, dgate and dup; write scale M F.

    dy, gate, up: [T, N], last strides 1; of `unit` the two lie apart; `narrow` are those of the unit, dgate and dup.
    The gradients are written to `memory`, of the same form, which may be dy, gate or up: a program reads a tile of
    these before it writes there, and no other reads that one. None: new memory.
    """
    num_rows, num_columns = dy.shape
    dgate, dup = (dy.new_empty((num_rows, num_columns)) if place is None else place for place in memory)
    ranks = [item.factor.shape[1] for item in narrow]
    capability = torch.cuda.get_device_capability(dy.device) if dy.is_cuda else NO_GPU
    tile = tile_of(capability, max(ranks))
    blocks = ceil_div(num_rows, BLOCK_ROWS)
    columns = ceil_div(ceil_div(num_columns, COLUMN_GROUPS), tile["BLOCK_COLUMNS"]) * tile["BLOCK_COLUMNS"]
    groups = ceil_div(num_columns, columns)
    outers = [dy.new_empty((groups, num_rows, rank), dtype=torch.float32) for rank in ranks]
    sums = [dy.new_empty((blocks, num_columns, rank), dtype=torch.float32) for rank in ranks]
    constants = unit.constants()
    with on_device(dy):
        launch(
            gated_products_kernel,
            (blocks, groups),
            dy,
            gate,
            up,
            dgate,
            dup,
            *(item.factor for item in narrow),
            *(item.left for item in narrow),
            *outers,
            *sums,
            num_rows,
            num_columns,
            columns,
            *ranks,
            *(rows.stride(0) for rows in (dy, gate, up, dgate, dup)),
            *(stride for item in narrow for stride in item.factor.stride()),
            *(item.left.stride(0) for item in narrow),
            *unit.rounded(gate, up).numbers(),
            ACT=constants["ACT"],
            HAS_GATE_SCALE=constants["HAS_GATE_SCALE"],
            HAS_UP_OFFSET=constants["HAS_UP_OFFSET"],
            HAS_GATE_LIMIT=constants["HAS_GATE_LIMIT"],
            HAS_UP_LIMIT=constants["HAS_UP_LIMIT"],
            PASSES_AT_LIMIT=passes_at_limit(),
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_RANK=max(next_power_of_two(max(ranks)), LEAST_RANK),
            **tile,
            enable_fp_fusion=True,  # as in the unit's own kernels and in narrow products
        )
        found: list[Tensor] = []
        for item, outer, parts in zip(narrow, outers, sums, strict=True):
            launch_narrow_sum(outer, item.out, item.scale)
            out = item.factor.new_empty((num_columns, item.factor.shape[1]))
            launch_narrow_sum(parts, out, item.scale)
            found.append(out)
    return dgate, dup, found
