"""What a match of `rope` turns: which items of a head, in which pairs, by tables of which dims."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fxopt.graph.arguments import same_size
from fxopt.rewriting.pattern import Match


class Rotation(NamedTuple):
    """What is turned in each head, and how its pairs lie."""

    pairing: str
    out_pairing: str
    start: int
    length: int
    sign: int
    heads: int


def heads_of(m: Match, name: str) -> torch.Tensor:
    """Return the example of the heads turned: `name`, or those whose pairs are a view of another shape of it."""
    x = m.example(name)
    if m["pieces"] != "lanes" or m["part"] != "whole":
        return x
    pairs = m.example(f"{name}_lanes")
    return pairs.flatten(-2) if pairs.dim() > 1 and pairs.shape[-1] == 2 else x


def read_rotation(m: Match, name: str) -> Rotation | str:
    """Return how `name` is turned, or why the op does not do that."""
    x = heads_of(m, name)
    size = x.shape[-1]
    if not isinstance(size, int):
        return f"the heads of {name} have {size} items, which change between calls, expected a fixed number"
    if x.dim() not in (3, 4):
        return f"{name} has shape {list(x.shape)}, expected [..., heads, tokens, D] in 3 or 4 dims"
    part = _read_part(m, size)
    if isinstance(part, str):
        return part
    start, length = part
    pairing = _read_pairing(m, name, length)
    if pairing not in ("half", "interleaved"):
        return pairing
    if m["form"] == "whole" and pairing != m["out"]:
        return f"pairs are {pairing} before and {m['out']} after, expected the same"
    table = m.example("angles" if m["form"] == "complex" else "cos")
    items = table.shape[-1]
    if items != (length if m["form"] == "whole" else length // 2):
        return f"a table has {items} items for {length} items that are turned"
    heads = find_heads(table, x)
    if heads is None:
        return (
            f"a table has shape {list(table.shape)}, expected to broadcast over the heads of {list(x.shape)}"
        )
    sign = (-1 if m["turn"] == "minus" else 1) * (-1 if m["sum"] == "minus" else 1)
    return Rotation(pairing, m["out"], start, length, sign, heads)


def _read_part(m: Match, size: int) -> tuple[int, int] | str:
    """Return where the turned items begin and how many they are."""
    if m["part"] == "whole":
        return 0, size
    is_first = m["part"] == "first"
    if m["sizes"] is not None:
        sizes: Any = m["sizes"]
        if not isinstance(sizes, tuple) or len(sizes) != 2:
            sizes = (sizes, size - sizes) if isinstance(sizes, int) and sizes < size <= 2 * sizes else ()
        first, last = range(size)[: sum(sizes[:1])], range(size)[sum(sizes[:1]) :]
        inside, outside = (first, last) if is_first else (last, first)
    else:
        inside = range(size) if m["inside"] is None else _taken(m["inside"], size)
        outside = _taken(m["outside"], size)
    if inside is None or outside is None or not inside:
        return "the items of a head are not sliced, expected x[..., :R] and x[..., R:]"
    both = [*inside, *outside] if is_first else [*outside, *inside]
    if both != list(range(size)):
        return f"the slices hold {len(inside)} and {len(outside)} of {size} items, expected each item once and in place"
    return inside[0], len(inside)


def _read_pairing(m: Match, name: str, length: int) -> str:
    """Return how the items of pairs lie, or what is wrong with them."""
    half = length // 2
    if length % 2:
        return f"{length} items are turned, expected an even number"
    match m["pieces"]:
        case "lanes":
            shape = m.example(f"{name}_lanes").shape
            is_paired = tuple(shape[-2:]) == (half, 2)
            return "interleaved" if is_paired else f"x is viewed as {list(shape)}, expected [..., {half}, 2]"
        case "split":
            is_half = m["half"] in (half, (half, half))
            return "half" if is_half else f"split into {m['half']}, expected {half}"
        case "chunked":
            return "half"
        case _:
            a, b = _taken(m["a"], length), _taken(m["b"], length)
    whole = range(length)
    if (a, b) == (whole[:half], whole[half:]):
        return "half"
    if (a, b) == (whole[::2], whole[1::2]):
        return "interleaved"
    return f"the items of pairs are {m['a']} and {m['b']}, expected halves, or every second item"


def _taken(index: Any, size: int) -> range | None:
    """Return which items of the last dim an index takes; None if it is about other dims."""
    match index:
        case (built, slice() as taken) if built is ...:
            return (
                range(size)[taken]
                if all(_is_number(v) for v in (taken.start, taken.stop, taken.step))
                else None
            )
        case (built,) if built is ...:
            return range(size)
        case _:
            return None


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int)


def find_heads(table: torch.Tensor, x: torch.Tensor) -> int | None:
    """Return which dim of `x` counts heads: that over which the tables are the same, beside the tokens."""
    shape = (1,) * (x.dim() - table.dim()) + tuple(table.shape)
    for heads, tokens in ((-3, -2), (-2, -3)):
        is_one = isinstance(shape[heads], int) and shape[heads] == 1
        if len(shape) == x.dim() and is_one and same_size(shape[tokens], x.shape[tokens]):
            has_batch = len(shape) == 3 or same_size(shape[0], 1) or same_size(shape[0], x.shape[0])
            return heads if has_batch else None
    return None
