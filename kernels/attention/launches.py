"""Launches of the Triton kernels: strides, masks, and what is allocated."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.kernels.attention.backward import attention_backward_keys_kernel, attention_delta_kernel
from fxopt.kernels.attention.backward_queries import attention_backward_queries_kernel
from fxopt.kernels.attention.call import Call
from fxopt.kernels.attention.forward import attention_forward_kernel
from fxopt.kernels.attention.masks import launch_key_ranges
from fxopt.kernels.attention.plans import Plan, Tiles, plans_of, reading_tiles
from fxopt.kernels.attention.reference import LOWEST, LOWEST_OTHERWISE
from fxopt.kernels.launch import ceil_div, next_power_of_two, on_device
from fxopt.kernels.launcher import launch

MOST_WIDTH = 256
LEAST_BLOCK = 16  # of a matrix product
DELTA_QUERIES = 64


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
