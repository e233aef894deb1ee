"""How the kernels are launched: tiles, and programs shared out between q and k."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import ceil_div, next_power_of_two, num_processors, on_device
from fxopt.kernels.launcher import launch
from fxopt.kernels.norm_rope.backward_kernel import norm_rope_backward_kernel, norm_rope_sum_kernel
from fxopt.kernels.norm_rope.forward_kernel import norm_rope_forward_kernel
from fxopt.kernels.norm_rope.reference import Form, Four
from fxopt.kernels.rope.launches import dense_heads
from fxopt.kernels.rope.reference import Pair, new_like

FORWARD_ELEMENTS = 4096  # of a tile of 4 warps: 4 loads of 16 bytes a thread, as in `rope`
BACKWARD_ELEMENTS = 2048  # as many loads, half of each of two tensors, and the sums of the weight's gradient
NUM_WARPS = 4
MOST_WARPS = 16
WARPS_PER_PROCESSOR = (
    16  # of backward: 80 registers a thread by head, 101 over all heads (sm_90); 32 KB in flight
)


def tile_of(
    heads: list[int], size: int, length: int, per_head: bool, table_items: int, elements: int
) -> dict[str, Any]:
    """Return the sizes of a kernel's tile, and its warps.

    By head: as many heads as divide those of q and those of k, so that no thread is without one. Over all heads: all
    of them, of one token. SPREAD as in `rope`: Triton would change the layout of a larger tile to that of its table.
    """
    columns = next_power_of_two(size)
    if per_head:
        common = heads[0] | heads[-1]
        block_heads = min(common & -common, max(1, elements // columns))
        tokens, num_warps = max(1, elements // (block_heads * columns)), NUM_WARPS
    else:
        block_heads, tokens = next_power_of_two(max(heads)), 1
        share = elements // NUM_WARPS
        num_warps = max(1, min(MOST_WARPS, next_power_of_two(block_heads * columns // share)))
    threads = 32 * num_warps
    return {
        "BLOCK_TOKENS": tokens,
        "BLOCK_HEADS": block_heads,
        "BLOCK_HALF": next_power_of_two(length // 2),
        "BLOCK_PASSED": next_power_of_two(size - length),
        "SPREAD": tokens * next_power_of_two(table_items) >= threads,
        "SPREAD_WEIGHT": per_head and columns // 2 >= threads,
        "num_warps": num_warps,
    }


def constants_of(form: Form, size: int, table_items: int) -> dict[str, Any]:
    """Return what both kernels are compiled for, tiles left out."""
    return {
        "IN_PAIRS": form.pairing,
        "OUT_PAIRS": form.out_pairing,
        "TABLE_PAIRS": "single" if table_items < form.length else form.out_pairing,
        "HALF": form.length // 2,
        "NUM_PASSED": size - form.length,
        "START": form.start,
        "SIGN": form.sign,
        "PER_HEAD": form.per_head,
    }


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _same_strides(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    is_dense = cos.stride() == sin.stride() and cos.stride(-1) == 1
    return (cos, sin) if is_dense else (cos.contiguous(), sin.contiguous())


def launch_forward(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *attributes: Any,
) -> Pair:
    """Return q and k normalized and rotated, by the kernel: one launch for both."""
    *values, dtype = attributes
    form = Form(*values)
    given = [
        (dense_heads(x), new_like(x, dtype, is_head_major), weight)
        for x, is_head_major, weight in zip((q, k), form.head_major, (q_weight, k_weight), strict=True)
        if x is not None
    ]
    (x, y, weight), (other, other_y, other_weight) = given[0], given[-1]
    batch, tokens, _, size = x.shape
    heads = [each.shape[2] for each, _, _ in given]
    if batch * tokens * sum(heads) * size:
        table_items = cos.shape[-1]
        tile = tile_of(heads, size, form.length, form.per_head, table_items, FORWARD_ELEMENTS)
        cos, sin = _same_strides(cos, sin)
        num_token_tiles = ceil_div(tokens, tile["BLOCK_TOKENS"])
        num_tiles = [batch * num_token_tiles * ceil_div(each, tile["BLOCK_HEADS"]) for each in heads]
        with on_device(x):
            launch(
                norm_rope_forward_kernel,
                (sum(num_tiles),),
                x,
                other,
                x if weight is None else weight.contiguous(),
                x if other_weight is None else other_weight.contiguous(),
                cos,
                sin,
                y,
                other_y,
                *_strides(x, other, y, other_y),
                cos.stride(0) if cos.shape[0] > 1 else 0,
                cos.stride(1),
                tokens,
                num_token_tiles,
                heads[0],
                heads[-1],
                num_tiles[0],
                form.eps,
                form.offset,
                **constants_of(form, size, table_items),
                HAS_WEIGHT=weight is not None,
                CAST_FIRST=form.cast_first,
                ROUND=form.norm_dtype == x.dtype,
                **tile,
                enable_fp_fusion=True,  # sums of products: a fused multiply-add only rounds less
            )
    return y, None if k is None else other_y


def launch_backward(
    dq: Tensor | None,
    dk: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *attributes: Any,
) -> Four:
    """Return the gradients of q, k and of their weights, by the kernel; None where that of the result is None."""
    *values, need_weight = attributes
    form = Form(*values)
    given = [
        (dense_heads(dy), dense_heads(x), new_like(x, x.dtype, is_head_major), weight)
        for dy, x, is_head_major, weight in zip(
            (dq, dk), (q, k), form.head_major, (q_weight, k_weight), strict=True
        )
        if dy is not None and x is not None
    ]
    (dy, x, dx, weight), (other_dy, other, other_dx, other_weight) = given[0], given[-1]
    need_weight = need_weight and weight is not None
    dweights = [each.new_empty(each.shape) for *_, each in given if each is not None and need_weight]
    batch, tokens, _, size = x.shape
    heads = [each.shape[2] for _, each, _, _ in given]
    if batch * tokens * sum(heads) * size == 0:
        dweights = [each.zero_() for each in dweights]
    else:
        table_items = cos.shape[-1]
        tile = tile_of(heads, size, form.length, form.per_head, table_items, BACKWARD_ELEMENTS)
        cos, sin = _same_strides(cos, sin)
        num_token_tiles = ceil_div(tokens, tile["BLOCK_TOKENS"])
        num_tiles = [batch * num_token_tiles * ceil_div(each, tile["BLOCK_HEADS"]) for each in heads]
        programs = _programs_of(
            num_tiles, num_processors(x.device) * WARPS_PER_PROCESSOR // tile["num_warps"]
        )
        columns = [each.numel() for each in dweights]
        partial = dx
        if need_weight:
            partial = x.new_empty((sum(programs), max(columns)), dtype=torch.float32)
        with on_device(x):
            launch(
                norm_rope_backward_kernel,
                (sum(programs),),
                dy,
                other_dy,
                x,
                other,
                x if weight is None else weight.contiguous(),
                x if other_weight is None else other_weight.contiguous(),
                cos,
                sin,
                dx,
                other_dx,
                partial,
                *_strides(dy, other_dy, x, other, dx, other_dx),
                cos.stride(0) if cos.shape[0] > 1 else 0,
                cos.stride(1),
                partial.stride(0),
                tokens,
                num_token_tiles,
                heads[0],
                heads[-1],
                num_tiles[0],
                num_tiles[-1],
                programs[0],
                form.eps,
                form.offset,
                **constants_of(form, size, table_items),
                HAS_WEIGHT=weight is not None,
                NEED_WEIGHT=need_weight,
                **tile,
                enable_fp_fusion=True,  # as in forward
            )
            if need_weight:
                launch(
                    norm_rope_sum_kernel,
                    (ceil_div(max(columns), 64), len(given)),
                    partial,
                    dweights[0],
                    dweights[-1],
                    partial.stride(0),
                    programs[0],
                    sum(programs),
                    columns[0],
                    columns[-1],
                    BLOCK_ROWS=64,
                    BLOCK_COLUMNS=64,
                    num_warps=8,
                    enable_fp_fusion=True,  # sums only: nothing to fuse
                )
    dweight, other_dweight = (dweights[0], dweights[-1]) if dweights else (None, None)
    is_q, is_k = dq is not None, dk is not None and k is not None
    return (
        dx if is_q else None,
        other_dx if is_k else None,
        dweight if is_q else None,
        other_dweight if is_k else None,
    )


def _programs_of(num_tiles: list[int], most: int) -> list[int]:
    """Return how many programs walk the tiles of each tensor: as its share of them, at least one."""
    most = min(max(most, len(num_tiles)), sum(num_tiles))
    if len(num_tiles) == 1:
        return [most]
    first = max(1, min(most - 1, round(most * num_tiles[0] / sum(num_tiles))))
    return [first, most - first]
