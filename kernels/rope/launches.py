"""How the kernel is launched: its tile, and q and k in one grid."""

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import ceil_div, next_power_of_two, on_device
from fxopt.kernels.launcher import launch
from fxopt.kernels.rope.kernels import rope_kernel
from fxopt.kernels.rope.reference import Pair, new_like

TILE_ELEMENTS = 4096
"""Of 28 + 4 heads of 128 one token. With 4 warps a thread has 4 loads of 16 bytes in flight, and it keeps the
32 table values that all its heads share."""
NUM_WARPS = 4


def tile_of(num_heads: int, size: int, length: int, table_pairs: str) -> dict[str, int]:
    """Return the sizes of the kernel's tile: the heads of one token, of several where these are few.

    Triton loads a table in the layout of x (16 bytes a thread) only where it has fewer items than the program
    has threads; a larger one is given the size of x instead (SPREAD), else x itself would change its layout.
    """
    columns = next_power_of_two(size)
    per_token = next_power_of_two(length if table_pairs == "interleaved" else length // 2)
    heads = min(next_power_of_two(num_heads), max(1, TILE_ELEMENTS // columns))
    tokens = max(1, TILE_ELEMENTS // (heads * columns))
    if tokens == 1 and heads > 1 and num_heads % heads and num_heads % heads <= heads // 2:
        heads //= 2  # else half or more of the threads of a token's last program would have no head
    return {
        "BLOCK_TOKENS": tokens,
        "BLOCK_HEADS": heads,
        "BLOCK_HALF": next_power_of_two(length // 2),
        "BLOCK_PASSED": next_power_of_two(size - length),
        "SPREAD": tokens * per_token >= 32 * NUM_WARPS,
    }


def _launch(
    transposed: bool,
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    pairing: str,
    out_pairing: str,
    start: int,
    length: int,
    sign: int,
    head_major: list[bool],
    dtype: torch.dtype,
) -> Pair:
    """Run the kernel on what there is of q and k: one launch for both."""
    given = [
        (dense_heads(x), new_like(x, dtype, is_head_major))
        for x, is_head_major in zip((q, k), head_major, strict=True)
        if x is not None
    ]
    (x, y), (other, other_y) = given[0], given[-1]
    batch, tokens, heads, size = x.shape
    num_heads = sum(each.shape[2] for each, _ in given)
    if batch * tokens * num_heads * size:
        table_pairs = "single" if cos.shape[-1] < length else out_pairing
        tile = tile_of(num_heads, size, length, table_pairs)
        if cos.stride() != sin.stride() or cos.stride(-1) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        num_token_tiles = ceil_div(tokens, tile["BLOCK_TOKENS"])
        grid = (batch * num_token_tiles, ceil_div(num_heads, tile["BLOCK_HEADS"]))
        with on_device(x):
            launch(
                rope_kernel,
                grid,
                x,
                other,
                cos,
                sin,
                y,
                other_y,
                *x.stride()[:3],
                *other.stride()[:3],
                *y.stride()[:3],
                *other_y.stride()[:3],
                cos.stride(0) if cos.shape[0] > 1 else 0,
                cos.stride(1),
                tokens,
                num_token_tiles,
                heads,
                num_heads,
                IN_PAIRS=out_pairing if transposed else pairing,
                OUT_PAIRS=pairing if transposed else out_pairing,
                TABLE_PAIRS=table_pairs,
                HALF=length // 2,
                NUM_PASSED=size - length,
                START=start,
                SIGN=-sign if transposed else sign,
                TRANSPOSED=transposed,
                **tile,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,  # two products and their sum: a fused multiply-add only rounds less
            )
    return None if q is None else y, None if k is None else other_y


def dense_heads(x: Tensor) -> Tensor:
    """Return `x` with the items of a head side by side: itself wherever a model made it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_forward(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *attributes: Any) -> Pair:
    """Return q and k rotated, by the kernel."""
    return _launch(False, q, k, cos, sin, *attributes)


def launch_backward(dq: Tensor | None, dk: Tensor | None, cos: Tensor, sin: Tensor, *attributes: Any) -> Pair:
    """Return the gradients of q and k, by the kernel."""
    return _launch(True, dq, dk, cos, sin, *attributes)
