"""Launches of the Triton kernels: tiles by width and device, strides, and what is allocated."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.kernels.attention.backward import (
    attention_backward_keys_kernel,
    attention_backward_queries_kernel,
    attention_delta_kernel,
)
from fxopt.kernels.attention.call import Call
from fxopt.kernels.attention.forward import attention_forward_kernel
from fxopt.kernels.attention.masks import launch_key_ranges
from fxopt.kernels.attention.reference import LOWEST, LOWEST_OTHERWISE
from fxopt.kernels.launch import ceil_div, next_power_of_two, on_device
from fxopt.kernels.launcher import launch

MOST_WIDTH = 256
LEAST_BLOCK = 16  # of a matrix product
LARGE_SHARED = (9, 10)  # compute capabilities with 227 KiB of shared memory a block
DELTA_QUERIES = 64


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps and pipeline stages of one launch."""

    queries: int
    keys: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """The tiles of the three kernels where they do not read a mask."""

    forward: Tiles
    dkeys: Tiles
    dqueries: Tiles


INTERPRETED = Plan(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1))
HOPPER = {
    64: (
        Plan(Tiles(128, 128, 8, 3), Tiles(64, 128, 8, 2), Tiles(128, 64, 8, 3)),
        Plan(Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 3), Tiles(64, 64, 4, 3)),
    ),
    128: (
        Plan(Tiles(128, 128, 8, 2), Tiles(32, 128, 8, 3), Tiles(128, 64, 8, 3)),
        Plan(Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2), Tiles(64, 64, 4, 3)),
    ),
    256: (
        Plan(Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(128, 32, 8, 2)),
        Plan(Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(64, 32, 8, 2)),
    ),
}
"""By the padded width, the likeliest first; all stay in 255 registers a thread and 227 KiB of shared memory. Forward
holds its sums of 128 x width in registers; the gradients of keys hold two of [keys, width], so that the wider the
heads the fewer the keys."""
AMPERE = {
    64: (Plan(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),),
    128: (Plan(Tiles(128, 32, 8, 2), Tiles(32, 64, 8, 2), Tiles(64, 32, 4, 2)),),
    256: (Plan(Tiles(64, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(32, 32, 8, 1)),),
}
"""Fit into the 99 KiB of shared memory of compute capability 8.6 and 8.9."""
FLOAT32 = {
    64: (Plan(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 16, 4, 1)),),
    128: (Plan(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 8, 1)),),
    256: (Plan(Tiles(16, 16, 4, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),),
}
"""Products of float32 in full precision run outside the tensor cores: small tiles, to stay in registers."""

READING = {64: Tiles(32, 32, 4, 1), 128: Tiles(32, 32, 4, 1), 256: Tiles(16, 32, 8, 1)}
"""By the padded width: the tiles of all three kernels where a mask that is no interval has to be read."""


@functools.cache
def plans_for(width: int, dtype: torch.dtype, capability: tuple[int, int]) -> tuple[Plan, ...]:
    """Return the plans worth trying for heads of `width`, the likeliest first.

    >>> plans_for(128, torch.bfloat16, (9, 0))[0].forward
    Tiles(queries=128, keys=128, warps=8, stages=2)
    """
    table = FLOAT32 if dtype == torch.float32 else HOPPER if capability[0] in LARGE_SHARED else AMPERE
    return table[next(known for known in table if known >= next_power_of_two(width))]


def plans_of(call: Call) -> tuple[Plan, ...]:
    """Return the plans worth trying for this call."""
    if call.q.device.type != "cuda":
        return (INTERPRETED,)
    return plans_for(_widest(call), call.q.dtype, torch.cuda.get_device_capability(call.q.device))


def reading_tiles(call: Call) -> Tiles:
    """Return the tiles for reading a mask."""
    if call.q.device.type != "cuda":
        return INTERPRETED.forward
    width = next_power_of_two(_widest(call))
    if call.q.dtype == torch.float32:
        return Tiles(16, 16, 8, 1)
    return READING[next(known for known in READING if known >= width)]


def _widest(call: Call) -> int:
    return max(call.q.shape[-1], call.v.shape[-1])


def _block(width: int) -> int:
    return max(next_power_of_two(width), LEAST_BLOCK)


def with_dense_rows(x: Tensor) -> Tensor:
    """Return `x` with a last stride of 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    batch, head, row, _ = x.stride()
    return batch, head, row


def _broadcast_strides(x: Tensor, start: int) -> list[int]:
    """Return the strides of dims that only repeat as 0."""
    pairs = zip(x.shape[start:], x.stride()[start:], strict=True)
    return [0 if size == 1 else stride for size, stride in pairs]


class _Mask(NamedTuple):
    """A mask as kernels take it."""

    mask: Tensor
    intervals: Tensor
    reads: Tensor
    mask_strides: list[int]
    interval_strides: list[int]
    lowest: float
    constants: dict[str, bool]
    turns: tuple[bool, ...]


def _prepare_mask(call: Call) -> _Mask:
    q, mask, intervals, reads = call.q, call.mask, call.intervals, call.reads
    if mask is None or intervals is None or reads is None:
        return _Mask(q, q, q, [0] * 4, [0] * 4, 0.0, dict(HAS_MASK=False, IS_BOOL=False), (False,))
    is_bool = mask.dtype == torch.bool
    lowest = LOWEST.get(mask.dtype, LOWEST_OTHERWISE)
    strides = [*_broadcast_strides(mask, 0)[:3], mask.stride(3)]
    kind_stride = intervals.stride(0)
    return _Mask(
        mask.view(torch.uint8) if is_bool else mask,
        intervals,
        reads,
        strides,
        [kind_stride, *_broadcast_strides(intervals, 1)],
        lowest,
        dict(HAS_MASK=True, IS_BOOL=is_bool),
        (False, True),
    )


def _form(call: Call, masked: _Mask) -> dict[str, Any]:
    """Return the constants that the kernels of both passes are compiled for."""
    width, value_width = call.q.shape[-1], call.v.shape[-1]
    return dict(
        CAUSAL=call.causal,
        HAS_SOFTCAP=call.softcap != 0,
        WIDTH=width,
        BLOCK_WIDTH=_block(width),
        VALUE_WIDTH=value_width,
        BLOCK_VALUE=_block(value_width),
        PRECISION="ieee" if call.q.dtype == torch.float32 else "tf32",
        **masked.constants,
    )


def _tile_options(tiles: Tiles) -> dict[str, Any]:
    return dict(
        QUERIES=tiles.queries,
        KEYS=tiles.keys,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        enable_fp_fusion=True,  # products and sums: a fused multiply-add only rounds less
    )


def new_heads_last(x: Tensor, width: int) -> Tensor:
    """Return an empty [B, H, S, width] in the memory layout [B, S, H, width]."""
    batch, heads, length, _ = x.shape
    return x.new_empty((batch, length, heads, width)).transpose(1, 2)


def with_dense_inputs(call: Call) -> Call:
    """Return `call` with q, k and v of last stride 1."""
    q, k, v = map(with_dense_rows, (call.q, call.k, call.v))
    if q is call.q and k is call.k and v is call.v:
        return call
    return dataclasses.replace(call, q=q, k=k, v=v)


def launch_forward(call: Call, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
    """Return the attention and its lse, by the kernel."""
    call = with_dense_inputs(call)
    q, k, v, sinks = call.q, call.k, call.v, call.sinks
    out = new_heads_last(q, v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    batch, num_heads, num_queries, _ = q.shape
    if out.numel() == 0:
        return out, lse
    plan = plan or plans_of(call)[0]
    masked = _prepare_mask(call)
    form = _form(call, masked)
    with on_device(q):
        for reading in masked.turns:
            tiles = reading_tiles(call) if reading else plan.forward
            launch(
                attention_forward_kernel,
                (ceil_div(num_queries, tiles.queries), batch * num_heads),
                q,
                k,
                v,
                masked.mask,
                masked.intervals,
                masked.reads,
                q if sinks is None else sinks.contiguous(),
                out,
                lse,
                *_strides(q),
                *_strides(k),
                *_strides(v),
                *_strides(out),
                *masked.mask_strides,
                *masked.interval_strides,
                num_heads,
                num_heads // k.shape[1],
                num_queries,
                k.shape[2],
                call.scale,
                call.softcap,
                masked.lowest,
                HAS_SINKS=sinks is not None,
                READS=reading,
                **form,
                **_tile_options(tiles),
            )
    return out, lse


class _Backward(NamedTuple):
    """What the two kernels of gradients read beside the call."""

    dout: Tensor
    lse: Tensor
    delta: Tensor
    masked: _Mask


def launch_backward(
    call: Call, out: Tensor, lse: Tensor, dout: Tensor, needs: list[bool], plan: Plan | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v and sinks that are needed, by the kernels."""
    call, dout = with_dense_inputs(call), with_dense_rows(dout)
    q, k, v, sinks = call.q, call.k, call.v, call.sinks
    need_q, need_k, need_v, need_sinks = needs
    dq = new_heads_last(q, q.shape[-1]) if need_q else None
    dk = new_heads_last(k, k.shape[-1]) if need_k or need_v else None
    dv = new_heads_last(v, v.shape[-1]) if need_k or need_v else None
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        dsinks = None if sinks is None or not need_sinks else torch.zeros_like(sinks)
        for value in (dq, dk, dv):
            if value is not None:
                value.zero_()
        return dq, dk if need_k else None, dv if need_v else None, dsinks
    plan = plan or plans_of(call)[0]
    masked = _prepare_mask(call)
    form = _form(call, masked)
    with on_device(q):
        delta, dsinks = _launch_delta(dout, out, lse, sinks if need_sinks else None)
        given = _Backward(dout, lse, delta, masked)
        for reading in masked.turns:
            form["READS"] = reading
            tiles = reading_tiles(call) if reading else None
            if dk is not None and dv is not None:
                _launch_dkeys(call, given, dk, dv, form, tiles or plan.dkeys)
            if dq is not None:
                _launch_dqueries(call, given, dq, form, tiles or plan.dqueries)
    return dq, dk if need_k else None, dv if need_v else None, dsinks


def _launch_delta(
    dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    delta = torch.empty_like(lse)
    batch, num_heads, num_queries, width = out.shape
    tiles = ceil_div(num_queries, DELTA_QUERIES)
    partial = None if sinks is None else lse.new_empty((batch, num_heads, tiles))
    launch(
        attention_delta_kernel,
        (tiles, batch * num_heads),
        dout,
        out,
        lse,
        lse if sinks is None else sinks.contiguous(),
        delta,
        delta if partial is None else partial,
        *_strides(dout),
        *_strides(out),
        num_heads,
        num_queries,
        HAS_SINKS=sinks is not None,
        VALUE_WIDTH=width,
        BLOCK_VALUE=_block(width),
        QUERIES=DELTA_QUERIES,
        num_warps=4,
        enable_fp_fusion=True,  # sums of products
    )
    dsinks = None if sinks is None or partial is None else partial.sum((0, 2)).to(sinks.dtype)
    return delta, dsinks


def _launch_dkeys(
    call: Call, given: _Backward, dk: Tensor, dv: Tensor, form: dict[str, Any], tiles: Tiles
) -> None:
    q, k, v, masked = call.q, call.k, call.v, given.masked
    batch, num_key_heads, num_keys, _ = k.shape
    num_queries = q.shape[2]
    ranges, range_strides = q, [0, 0, 0]
    if form["HAS_MASK"]:
        ranges = launch_key_ranges(masked.intervals, num_queries, num_keys, tiles.keys)
        range_strides = [ranges.stride(0), *_broadcast_strides(ranges, 1)[:2]]
    launch(
        attention_backward_keys_kernel,
        (ceil_div(num_keys, tiles.keys), batch * num_key_heads),
        q,
        k,
        v,
        given.dout,
        given.lse,
        given.delta,
        masked.mask,
        masked.intervals,
        masked.reads,
        ranges,
        dk,
        dv,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(given.dout),
        *_strides(dk),
        *_strides(dv),
        *masked.mask_strides,
        *masked.interval_strides,
        *range_strides,
        num_key_heads,
        q.shape[1] // num_key_heads,
        num_queries,
        num_keys,
        call.scale,
        call.softcap,
        masked.lowest,
        **form,
        **_tile_options(tiles),
    )


def _launch_dqueries(call: Call, given: _Backward, dq: Tensor, form: dict[str, Any], tiles: Tiles) -> None:
    q, k, v, masked = call.q, call.k, call.v, given.masked
    batch, num_heads, num_queries, _ = q.shape
    launch(
        attention_backward_queries_kernel,
        (ceil_div(num_queries, tiles.queries), batch * num_heads),
        q,
        k,
        v,
        given.dout,
        given.lse,
        given.delta,
        masked.mask,
        masked.intervals,
        masked.reads,
        dq,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(given.dout),
        *_strides(dq),
        *masked.mask_strides,
        *masked.interval_strides,
        num_heads,
        num_heads // k.shape[1],
        num_queries,
        k.shape[2],
        call.scale,
        call.softcap,
        masked.lowest,
        **form,
        **_tile_options(tiles),
    )
