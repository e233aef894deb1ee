"""What a rotation is: the reference in plain torch, and the way back."""

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import wide_dtype

PAIRINGS = ("half", "interleaved")
Pair = tuple[Tensor | None, Tensor | None]


def items_of_pairs(x: Tensor, pairing: str) -> tuple[Tensor, Tensor]:
    """Return the first and the second item of every pair."""
    if pairing == "interleaved":
        return x[..., ::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def from_pairs(first: Tensor, second: Tensor, pairing: str) -> Tensor:
    """Return the items of pairs in one tensor."""
    if pairing == "interleaved":
        return torch.stack((first, second), dim=-1).flatten(-2)
    return torch.cat((first, second), dim=-1)


def rotated(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    pairing: str,
    out_pairing: str,
    start: int,
    length: int,
    transposed: bool,
) -> Tensor:
    """Return `x` with `length` items of each head turned, in fp32 or fp64; `transposed` is the way back."""
    wide = wide_dtype(x.dtype)
    tables: list[Tensor] = []
    for table in (cos, sin):
        table = table.to(wide).unsqueeze(-2)
        is_per_pair = table.shape[-1] < length
        tables.extend((table, table) if is_per_pair else items_of_pairs(table, out_pairing))
    cos1, cos2, sin1, sin2 = tables
    if transposed:
        pairing, out_pairing, sin1, sin2 = out_pairing, pairing, -sin2, -sin1
    x1, x2 = items_of_pairs(x[..., start : start + length].to(wide), pairing)
    turned = from_pairs(x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2, out_pairing)
    if length == x.shape[-1]:
        return turned
    return torch.cat((x[..., :start].to(wide), turned, x[..., start + length :].to(wide)), dim=-1)


def rope_reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    pairing: str = "half",
    out_pairing: str = "",
    start: int = 0,
    length: int = 0,
    sign: int = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return `x`, [batch, tokens, heads, D], rotated, in plain torch: the specification.

    cos, sin: [batch or 1, tokens, R or R/2]; R is `length`, or D for 0.
    """
    turned = rotated(
        x, cos, sin * sign, pairing, out_pairing or pairing, start, length or x.shape[-1], transposed=False
    )
    return turned.to(out_dtype or x.dtype)


def new_like(x: Tensor, dtype: torch.dtype, head_major: bool) -> Tensor:
    """Return fresh memory of the shape of `x`; `head_major` lays the tokens of one head side by side."""
    if not head_major:
        return x.new_empty(x.shape, dtype=dtype)
    batch, tokens, heads, size = x.shape
    return x.new_empty((batch, heads, tokens, size), dtype=dtype).transpose(1, 2)


def _plain(
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
    def turn(x: Tensor | None, is_head_major: bool) -> Tensor | None:
        if x is None:
            return None
        turned = rotated(x, cos, sin * sign, pairing, out_pairing, start, length, transposed)
        return new_like(x, dtype, is_head_major).copy_(turned)

    return turn(q, head_major[0]), turn(k, head_major[1])


def plain_forward(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *attributes: Any) -> Pair:
    """Return q and k rotated, in plain torch."""
    return _plain(False, q, k, cos, sin, *attributes)


def plain_backward(dq: Tensor | None, dk: Tensor | None, cos: Tensor, sin: Tensor, *attributes: Any) -> Pair:
    """Return the gradients of q and k, in plain torch."""
    return _plain(True, dq, dk, cos, sin, *attributes)
