"""Sizes that an op needs to be equal and capture does not know to be: torch computes the op's result without asking.

What Dynamo lets change is a symbol of its own at each place, so the lengths of keys and values, say, that come from two
inputs, are two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxopt.graph.arguments import same_size
from fxopt.graph.sizes import EXAMPLE
from fxopt.graph.torch_private import constant_of, hint_of, part_known

Pairs = Iterator[tuple[Any, Any]]


def equate_sizes(graph: fx.Graph) -> dict[Any, int]:
    """Have capture guard sizes to be equal that ops in `graph` need to be and that were, and return what that tells.

    That is by expression: of a symbol alone torch knows it itself. A call in which they differ is captured anew: a
    batch of one goes with any other in stock, and what else differs is an error of the op's there.
    """
    known: dict[Any, int] = {}
    for node in graph.nodes:
        find_pairs = NEEDED.get(node.target) if node.op == "call_function" else None
        if find_pairs is None:
            continue
        for ours, theirs in find_pairs(
            *map(_value, node.args), **{k: _value(v) for k, v in node.kwargs.items()}
        ):
            seen = hint_of(ours)
            if seen is not None and seen == hint_of(theirs) and not same_size(ours, theirs):
                bool(ours == theirs)  # asking makes the guard
                known.update(_learn(ours, theirs))
    return known


def _learn(*sizes: Any) -> Iterator[tuple[Any, int]]:
    """Yield what is known of one of two equal sizes by the other, a number."""
    numbers = [size for size in sizes if isinstance(size, int)]
    for size in sizes:
        if numbers and isinstance(size, torch.SymInt) and constant_of(size) is None:
            yield part_known(size, *numbers)


def _value(item: Any) -> Any:
    if isinstance(item, fx.Node):
        return item.meta.get(EXAMPLE)
    return [_value(part) for part in item] if isinstance(item, tuple | list) else item


def _of_attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> Pairs:
    """Yield the sizes of torch's `scaled_dot_product_attention` that have to be equal, a mask's unless they are 1."""
    if not all(isinstance(tensor, Tensor) for tensor in (query, key, value)):
        return
    yield key.shape[-2], value.shape[-2]
    yield query.shape[-1], key.shape[-1]
    scores = (*query.shape[:-1], key.shape[-2])
    if query.dim() == key.dim() == value.dim() == 4:
        yield from ((tensor.shape[0], query.shape[0]) for tensor in (key, value))
    if isinstance(attn_mask, Tensor):
        sizes = zip(reversed(attn_mask.shape), reversed(scores), strict=False)
        yield from ((size, full) for size, full in sizes if hint_of(size) != 1)


def _of_norm(input: Any, normalized_shape: Any, *_: Any, **__: Any) -> Pairs:
    """Yield the sizes of torch's norms over last dims that have to be equal."""
    if isinstance(input, Tensor) and isinstance(normalized_shape, Sequence):
        yield from zip(reversed(input.shape), reversed(normalized_shape), strict=False)


NEEDED: dict[Any, Callable[..., Pairs]] = {
    F.scaled_dot_product_attention: _of_attention,
    F.layer_norm: _of_norm,
    F.rms_norm: _of_norm,
}
