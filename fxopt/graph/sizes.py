"""Sizes as numbers: a symbolic one is what was seen of it at capture, and reading it makes no guard."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.graph.torch_private import constant_of, hint_of, known_as, size_seen, tree_map_only

EXAMPLE = "example_value"
SIZED: tuple[Any, ...] = (Tensor, torch.Size, torch.SymInt)
UNSEEN = 8
"""What a size is taken for that hangs on the values of a tensor."""


def number_of(size: Any) -> int:
    """Return a size as a number: the one seen at capture where it is symbolic, `UNSEEN` where none was seen."""
    hint = hint_of(size)
    return UNSEEN if hint is None else hint


def make_seen(value: Any, make: Callable[[Tensor, list[int], list[int]], Tensor]) -> Any:
    """Return a node's value with the sizes seen at capture: a tensor as `make` returns it from sizes and strides.

    >>> make_seen(torch.ones(2, 3).t(), lambda value, sizes, strides: value.new_zeros(sizes)).shape, make_seen(4, None)
    (torch.Size([3, 2]), 4)
    """
    if isinstance(value, torch.SymInt):
        return size_seen(value)
    if not isinstance(value, Tensor):
        return value
    sizes, strides = (list(map(size_seen, each)) for each in (value.shape, value.stride()))
    return make(value, sizes, strides)


def num_bytes_of(value: Tensor) -> int:
    """Return the bytes of one tensor's items.

    >>> import torch
    >>> num_bytes_of(torch.ones(2, 3, dtype=torch.bfloat16))
    12
    """
    return math.prod(map(number_of, value.shape)) * value.element_size()


def span_of(value: Tensor) -> int:
    """Return how many items of its storage lie between the first and the last of one tensor, these among them.

    >>> import torch
    >>> span_of(torch.ones(4, 6)[:, :2]), span_of(torch.ones(1).expand(5)), span_of(torch.ones(0, 3))
    (20, 1, 0)
    """
    sizes, strides = (list(map(number_of, each)) for each in (value.shape, value.stride()))
    if 0 in sizes:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def settle_sizes(graph: fx.Graph, known: Mapping[Any, int] = MappingProxyType({})) -> None:
    """Make numbers of the symbolic sizes in the example values of `graph` that capture has found to be numbers since.

    A size that a frame was captured for as one that changes, and that met a weight's on the way, is guarded to be equal
    to it; the tensors made before that still carry the symbol. So do sizes with a part that is `known`, by expression.
    Values in the same memory stay so.
    """
    settled = functools.partial(_settled, known=known)
    for node in graph.nodes:
        if EXAMPLE in node.meta:
            node.meta[EXAMPLE] = tree_map_only(SIZED, settled, node.meta[EXAMPLE])


def find_settled(shape: Any) -> tuple[int, ...] | None:
    """Return a shape that is an argument, or a node's, as numbers; None where capture has not fixed all of its sizes.

    >>> find_settled([2, 3])
    (2, 3)
    """
    sizes = shape.meta[EXAMPLE] if isinstance(shape, fx.Node) else shape
    numbers = tuple(_as_number(size, {}) for size in sizes)
    return numbers if all(isinstance(number, int) for number in numbers) else None


def _settled(value: Any, known: Mapping[Any, int]) -> Any:
    if isinstance(value, torch.Size):
        return tuple(_as_number(size, known) for size in value)
    return _settled_tensor(value, known) if isinstance(value, Tensor) else _as_number(value, known)


def _settled_tensor(value: Tensor, known: Mapping[Any, int]) -> Tensor:
    if value.layout is not torch.strided:
        return value
    form = (value.shape, value.stride())
    shape, stride = (tuple(_as_number(size, known) for size in sizes) for sizes in form)
    if all(type(new) is type(old) for new, old in zip((*shape, *stride), (*form[0], *form[1]), strict=True)):
        return value
    settled = value.detach().as_strided(shape, stride, _as_number(value.storage_offset(), known))
    return settled.requires_grad_(value.requires_grad)


def _as_number(size: Any, known: Mapping[Any, int]) -> Any:
    if not isinstance(size, torch.SymInt):
        return size
    number = constant_of(size)
    number = known_as(size, known) if number is None and known else number
    return size if number is None else number
