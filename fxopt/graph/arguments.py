"""How a stock node's arguments are read: bound to names by signature, dims counted from the last."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxopt.graph.torch_private import expression_of
from fxopt.graph.view import value_of

KEYWORDS = {"input": "x", "self": "x", "axis": "dim", "axis0": "dim0", "axis1": "dim1"}
SIZE_NAMES = ("size", "shape", "dims")


class Form(NamedTuple):
    """A canonical call that computes what a stock node does."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def bind(node: fx.Node, *required: str, **optional: Any) -> dict[str, Any] | None:
    """Return the arguments of `node` by name, defaults filled in; None if they do not fit the signature."""
    names = (*required, *optional)
    if len(node.args) > len(names):
        return None
    bound = dict(zip(names, node.args, strict=False))
    for keyword, value in node.kwargs.items():
        name = keyword if keyword in names else KEYWORDS.get(keyword, keyword)
        if name not in names or name in bound:
            return None
        bound[name] = value
    for name, default in optional.items():
        bound.setdefault(name, default)
    return bound if all(name in bound for name in required) else None


def sizes_of(node: fx.Node) -> tuple[Any, ...] | None:
    """Return the sizes or dims after the tensor, given one by one or as one list; None if neither."""
    rest = node.args[1:]
    for name in SIZE_NAMES:
        if name in node.kwargs and not rest:
            rest = (node.kwargs[name],)
    if len(node.kwargs) > (1 if not node.args[1:] else 0):
        return None
    if len(rest) == 1 and isinstance(rest[0], list | tuple):
        rest = tuple(rest[0])
    return rest if rest and all(is_integer(item) for item in rest) else None


def is_integer(item: Any) -> bool:
    """Return whether `item` is an int or a node whose value is one."""
    if isinstance(item, fx.Node):
        return isinstance(value_of(item), int | torch.SymInt)
    return isinstance(item, int) and not isinstance(item, bool)


def is_number(item: Any) -> bool:
    """Return whether `item` is a Python number or a node whose value is one."""
    if isinstance(item, fx.Node):
        return isinstance(value_of(item), int | float | torch.SymInt | torch.SymFloat)
    return isinstance(item, int | float)


def rank_of(node: fx.Node) -> int:
    """Return the number of dims of a tensor node."""
    return value_of(node).dim()


def from_last(dim: Any, rank: int) -> int | None:
    """Return `dim` counted from the last of `rank` dims; None if it is not a plain int.

    >>> from_last(1, 4), from_last(-3, 4)
    (-3, -3)
    """
    if not isinstance(dim, int) or isinstance(dim, bool) or rank == 0:
        return None
    return dim - rank if dim >= 0 else dim


def same_size(a: Any, b: Any) -> bool:
    """Return whether two sizes are known to be equal; no guard is put on symbolic ones."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return expression_of(a) == expression_of(b)
    return isinstance(a, int) and isinstance(b, int) and a == b


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are known to have the same shape; no guard is put on symbolic ones."""
    return a.dim() == b.dim() and all(map(same_size, a.shape, b.shape))


def is_contiguous(value: Tensor) -> bool:
    """Return whether `value` is known to be dense in row-major order; no guard is put on symbolic shapes."""
    if all(isinstance(size, int) for size in (*value.shape, *value.stride())):
        return value.is_contiguous()
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if isinstance(size, int) and size == 1:
            continue
        if not same_size(stride, expected):
            return False
        expected = size * expected
    return True
