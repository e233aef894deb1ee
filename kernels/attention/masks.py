"""Masks as what they mean: in each row an interval of keys that are seen, found in one pass over the mask.

Causal, padded, sliding and packed masks are all of that kind. `fxopt::mask_intervals` reads a mask of any kind
and returns int32 [3, B, H, Sq]: the first key seen, one past the last, and what else the row needs (`READ`,
`LEVEL`, `NAN`); and int32 [1], not 0 if some row is no interval. Kernels go through the keys between these two
alone, and read the mask itself where that flag says so: no host ever waits for the answer, and any mask is
computed right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.kernels.attention.reference import LOWEST, LOWEST_OTHERWISE, find_level_rows, is_shut
from fxopt.kernels.launch import can_launch, ceil_div, jit, on_device, register_op, tl
from fxopt.kernels.launcher import launch

READ, LEVEL, NAN = 1, 2, 4
"""The row is no pure interval; all its logits are equal; all of it is NaN. Sums of these in the third plane."""
BLOCK_KEYS = 1024
BLOCK_ROWS = 1024
NUM_WARPS = 4


def plain_intervals(mask: Tensor, has_sinks: bool, safe: bool) -> tuple[Tensor, Tensor]:
    """Return the intervals of a mask [B, H, Sq, Sk], and the flag, in plain torch: the specification."""
    num_keys = mask.shape[-1]
    if mask.dtype == torch.bool:
        seen, is_level = mask, torch.zeros(mask.shape[:-1], dtype=torch.bool, device=mask.device)
        is_pure, has_infinite = torch.ones_like(is_level), torch.zeros_like(is_level)
    else:
        shut = is_shut(mask)
        seen, is_pure = ~shut, ((mask == 0) | shut).all(-1)
        is_level = find_level_rows(mask, shut) & (not has_sinks)
        has_infinite = (mask == -torch.inf).any(-1)
    at = torch.arange(num_keys, device=mask.device)
    first = torch.where(seen, at, num_keys).amin(-1)
    last = torch.where(seen, at + 1, 0).amax(-1)
    is_empty = last == 0
    is_pure = is_pure & ((last - first == seen.sum(-1)) | is_empty)
    is_nan = is_empty & ~is_level & (not safe and not has_sinks)
    goes_through = is_level | is_nan
    start = torch.where(goes_through | is_empty, 0, first)
    end = torch.where(goes_through, num_keys, last)
    must_read = torch.where(is_level, has_infinite, ~is_pure & ~is_nan)
    kind = READ * must_read.int() + LEVEL * is_level.int() + NAN * is_nan.int()
    return torch.stack([start, end, kind]).to(torch.int32), must_read.any().to(torch.int32).view(1)


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bool mask as what is added to scores: the lowest finite number where a key is not seen."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def clear_empty_rows(q: Tensor, seen: Tensor) -> Tensor:
    """Return q, zero and without a gradient in rows that see no key.

    Where scores are replaced by the lowest number, unlike where it is added to them, none of such a row matters.
    """
    return q.masked_fill(~seen.any(-1, keepdim=True), 0.0)


@jit
def mask_intervals_kernel(
    p_mask,
    p_intervals,
    p_reads,
    batch_stride,
    head_stride,
    row_stride,
    key_stride,
    num_heads,
    num_rows,
    num_keys,
    num_all_rows,
    lowest,
    IS_BOOL: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SAFE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Write the interval of one row of the mask."""
    program = tl.program_id(0)
    row = (program % num_rows).to(tl.int64)
    head = ((program // num_rows) % num_heads).to(tl.int64)
    batch = (program // num_rows // num_heads).to(tl.int64)
    p_row = p_mask + (batch * batch_stride + head * head_stride + row * row_stride)
    b_at = tl.arange(0, BLOCK_KEYS)
    b_first = tl.full((BLOCK_KEYS,), 2147483647, tl.int32)
    b_last = tl.zeros((BLOCK_KEYS,), tl.int32)
    b_count = tl.zeros((BLOCK_KEYS,), tl.int32)
    b_biased = tl.zeros((BLOCK_KEYS,), tl.int32)
    b_infinite = tl.zeros((BLOCK_KEYS,), tl.int32)
    for start in range(0, num_keys, BLOCK_KEYS):
        b_key = start + b_at
        b_inside = b_key < num_keys
        if IS_BOOL:
            b_value = tl.load(p_row + b_key.to(tl.int64) * key_stride, mask=b_inside, other=0)
            b_seen = b_value != 0
        else:
            b_value = tl.load(p_row + b_key.to(tl.int64) * key_stride, mask=b_inside, other=0.0)
            b_value = b_value.to(tl.float32)
            b_seen = ((b_value > lowest) | (b_value != b_value)) & b_inside
            b_biased += (b_seen & (b_value != 0.0)).to(tl.int32)
            b_infinite += (b_value == float("-inf")).to(tl.int32)
        b_first = tl.minimum(b_first, tl.where(b_seen, b_key, 2147483647))
        b_last = tl.maximum(b_last, tl.where(b_seen, b_key + 1, 0))
        b_count += b_seen.to(tl.int32)
    first, last, count = tl.min(b_first, 0), tl.max(b_last, 0), tl.sum(b_count, 0)
    num_infinite = tl.sum(b_infinite, 0)
    is_empty = last == 0
    first = tl.where(is_empty, 0, first)
    kind = ((last - first != count) | (tl.sum(b_biased, 0) > 0)).to(tl.int32)
    if not HAS_SINKS:
        if not IS_BOOL:
            is_level = is_empty & (num_infinite < num_keys)
            kind = tl.where(is_level, 2 + (num_infinite > 0).to(tl.int32), kind)
            last = tl.where(is_level, num_keys, last)
            is_empty = is_empty & (num_infinite == num_keys)
        if not SAFE:
            kind = tl.where(is_empty, 4, kind)
            last = tl.where(is_empty, num_keys, last)
    tl.store(p_intervals + program, first)
    tl.store(p_intervals + num_all_rows + program, last)
    tl.store(p_intervals + 2 * num_all_rows + program, kind)
    tl.atomic_max(p_reads, kind & 1, mask=(kind & 1) > 0)


def launch_intervals(mask: Tensor, has_sinks: bool, safe: bool) -> tuple[Tensor, Tensor]:
    """Return the intervals of a mask [B, H, Sq, Sk], and the flag, by the kernel."""
    intervals = mask.new_empty((3, *mask.shape[:-1]), dtype=torch.int32)
    reads = mask.new_zeros(1, dtype=torch.int32)
    num_rows = intervals.numel() // 3
    if num_rows == 0:
        return intervals, reads
    is_bool = mask.dtype == torch.bool
    with on_device(mask):
        launch(
            mask_intervals_kernel,
            (num_rows,),
            mask.view(torch.uint8) if is_bool else mask,
            intervals,
            reads,
            *mask.stride(),
            mask.shape[1],
            mask.shape[2],
            mask.shape[3],
            num_rows,
            LOWEST.get(mask.dtype, LOWEST_OTHERWISE),
            IS_BOOL=is_bool,
            HAS_SINKS=has_sinks,
            SAFE=safe,
            BLOCK_KEYS=BLOCK_KEYS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return intervals, reads


def _fused_intervals(mask: Tensor, has_sinks: bool, safe: bool) -> tuple[Tensor, Tensor]:
    served = can_launch(None if mask.dtype == torch.bool else mask)
    return (launch_intervals if served else plain_intervals)(mask, has_sinks, safe)


def _fake_intervals(mask: Tensor, has_sinks: bool, safe: bool) -> tuple[Tensor, Tensor]:
    return mask.new_empty((3, *mask.shape[:-1]), dtype=torch.int32), mask.new_empty(1, dtype=torch.int32)


mask_intervals = register_op(
    "mask_intervals(Tensor mask, bool has_sinks, bool safe) -> (Tensor, Tensor)",
    plain=plain_intervals,
    fused=_fused_intervals,
    fake=_fake_intervals,
)


def find_intervals(mask: Tensor, *, has_sinks: bool, safe: bool) -> tuple[Tensor, Tensor]:
    """Return the intervals of a mask [B, H, Sq, Sk], dims that only repeat it having size 1, and the flag.

    >>> mask = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]], dtype=torch.bool)[None, None]
    >>> intervals, reads = find_intervals(mask, has_sinks=False, safe=True)
    >>> intervals[:, 0, 0].tolist(), reads.item()
    ([[0, 0, 1], [1, 2, 3], [0, 0, 0]], 0)
    """
    return mask_intervals(mask, has_sinks, safe)


@jit
def key_ranges_kernel(
    p_intervals,
    p_ranges,
    num_rows,
    num_all_rows,
    num_key_tiles,
    num_ranges,
    queries_per_row,
    KEYS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Write the first query, and one past the last, that sees a key of one tile of KEYS keys."""
    tile = tl.program_id(0)
    matrix = tl.program_id(1)
    p_start = p_intervals + matrix.to(tl.int64) * num_rows
    first_key = tile * KEYS
    b_at = tl.arange(0, BLOCK_ROWS)
    b_first = tl.full((BLOCK_ROWS,), 2147483647, tl.int32)
    b_last = tl.zeros((BLOCK_ROWS,), tl.int32)
    for start in range(0, num_rows, BLOCK_ROWS):
        b_row = start + b_at
        b_inside = b_row < num_rows
        b_start = tl.load(p_start + b_row, mask=b_inside, other=0)
        b_end = tl.load(p_start + num_all_rows + b_row, mask=b_inside, other=0)
        b_touched = (b_start < first_key + KEYS) & (b_end > first_key)
        b_first = tl.minimum(b_first, tl.where(b_touched, b_row, 2147483647))
        b_last = tl.maximum(b_last, tl.where(b_touched, b_row + 1, 0))
    last = tl.max(b_last, 0)
    first = tl.where(last > 0, tl.min(b_first, 0), 0)
    at = matrix * num_key_tiles + tile
    tl.store(p_ranges + at, first * queries_per_row)
    tl.store(p_ranges + num_ranges + at, last * queries_per_row)


def launch_key_ranges(intervals: Tensor, num_queries: int, num_keys: int, tile: int) -> Tensor:
    """Return int32 [2, B, H, tiles of keys]: the queries that see each tile, by the kernel."""
    _, batch, heads, num_rows = intervals.shape
    tiles = ceil_div(num_keys, tile)
    ranges = intervals.new_empty((2, batch, heads, tiles))
    with on_device(intervals):
        launch(
            key_ranges_kernel,
            (tiles, batch * heads),
            intervals,
            ranges,
            num_rows,
            batch * heads * num_rows,
            tiles,
            batch * heads * tiles,
            num_queries if num_rows == 1 else 1,
            KEYS=tile,
            BLOCK_ROWS=BLOCK_ROWS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return ranges
