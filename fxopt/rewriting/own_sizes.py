"""Numbers of a search function that are sizes of its arguments, such as the width that a sum is divided by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.rewriting.pattern import Match, Mismatch
from fxopt.rewriting.trees import items_of

FACTORS = (3, 5, 7, 11, 13)
"""By what the sizes of an example grow, the smallest first: each by another, so that what a number grew by tells
which size it is."""

Sizes = dict[int, dict[int, str]]
"""By the place of a node in its graph and that of an operand of it, the size that the operand is: "x.shape[-1]"."""


def grown(case: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return arguments whose tensors are repeated along every dim, equal sizes by equal factors.

    None where all sizes are 1, or there are more than `FACTORS`.
    """
    sizes = sorted(
        {size for value in case if isinstance(value, torch.Tensor) for size in value.shape if size > 1}
    )
    if not sizes or len(sizes) > len(FACTORS):
        return None
    factors = {0: 1, 1: 1, **dict(zip(sizes, FACTORS, strict=False))}
    return tuple(
        value.detach().repeat([factors[size] for size in value.shape])
        if isinstance(value, torch.Tensor)
        else value
        for value in case
    )


def find_sizes(gm: fx.GraphModule, other: fx.GraphModule, shapes: Sequence[tuple[str, Any, Any]]) -> Sizes:
    """Return the operands of `gm` that are sizes: whole numbers that grew as one did in `other`, where sizes did.

    `shapes` has each tensor's name and its shapes in both. Where the graphs are two forms, nothing is known.
    """
    nodes, others = list(gm.graph.nodes), list(other.graph.nodes)
    if [(node.op, node.target) for node in nodes] != [(node.op, node.target) for node in others]:
        return {}
    known = dict(_sizes_of(shapes))
    found: Sizes = {}
    for at, (node, twin) in enumerate(zip(nodes, others, strict=True)):
        for place, pair in enumerate(zip(items_of(node.args), items_of(twin.args), strict=False)):
            if node.op == "call_function" and all(type(value) is int for value in pair) and pair in known:
                found.setdefault(at, {})[place] = known[pair]
    return found


def _sizes_of(shapes: Sequence[tuple[str, Any, Any]]) -> Iterator[tuple[Any, str]]:
    """Yield the sizes of all tensors, before and after, with their names; the first tensor's last, and so it stays."""
    for name, before, after in reversed(shapes):
        for dim, pair in enumerate(zip(before, after, strict=True)):
            if pair[0] != pair[1]:
                yield pair, f"{name}.shape[{dim - len(before)}]"


def with_sizes(
    check: Callable[[Match], Mismatch | None] | None, sizes: Sequence[str]
) -> Callable[[Match], Mismatch | None] | None:
    """Return a check of a match that asks for `sizes` to be what they are called, and then for `check`."""
    if not sizes:
        return check

    def check_sizes(match: Match) -> Mismatch | None:
        for size in sizes:
            name, _, rest = size.partition(".")
            shape, dim, got = match.example(name).shape, int(rest[len("shape[") : -1]), match[size]
            expected: Any = shape[dim] if -dim <= len(shape) else None
            if type(expected) is not int or expected != got:  # a symbol equals no number in every call
                return match.fail(f"expected {size} of {list(shape)}, got {got}", name)
        return None if check is None else check(match)

    return check_sizes if check is None else functools.update_wrapper(check_sizes, check)
