"""What stands around a value: whether a matrix product made it, and which reader a compiler would fuse it with."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxopt.graph import vocabulary
from fxopt.graph.names import op_name
from fxopt.graph.purity import PURE
from fxopt.graph.torch_private import TORCH_LINEAR
from fxopt.graph.view import is_tensor

PRODUCTS = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "outer"})
LAYOUT = frozenset(
    {
        *(vocabulary.cast, vocabulary.reshape, vocabulary.contiguous, torch.transpose, torch.permute),
        *(torch.unsqueeze, torch.squeeze, operator.getitem, torch.chunk, torch.split),
    }
)
SUMS = frozenset({torch.add, torch.sub})
SCALINGS = frozenset({torch.mul, torch.div, torch.neg})
"""A bias or an adapter added to a product leaves it one, and so does a number it is multiplied by."""


def is_product(node: fx.Node) -> bool:
    """Return whether a compiler leaves `node` to a library or an op of its own: a matrix product, a foreign op."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.op == "call_function" and node.target in vocabulary.BY_TARGET:
        return node.target in (TORCH_LINEAR, torch.matmul)
    name = op_name(node)
    return name in PRODUCTS or (name not in PURE and name != "dropout")


def comes_from_product(node: fx.Node) -> bool:
    """Return whether `node` is a matrix product, or one moved, cast, scaled, or added to.

    >>> graph = fx.Graph()
    >>> comes_from_product(graph.placeholder("x"))
    False
    """
    seen: set[fx.Node] = set()
    front = [node]
    while front:
        current = front.pop()
        if current in seen:
            continue
        seen.add(current)
        if is_product(current):
            return True
        target: Any = current.target
        if current.op == "call_function" and target in LAYOUT:
            front.extend(current.all_input_nodes[:1])
        elif current.op == "call_function" and target in SUMS | SCALINGS:
            sources = [source for source in current.all_input_nodes if is_tensor(source)]
            front.extend(sources if target in SUMS or len(sources) == 1 else ())
    return False


def is_function_of(node: fx.Node, source: fx.Node) -> bool:
    """Return whether `node` is `source`, or computed from it alone and not by a product."""
    while node is not source:
        read = [item for item in node.all_input_nodes if is_tensor(item)]
        if len(read) != 1 or is_product(node):
            return False
        (node,) = read
    return True


def find_fusible_reader(node: fx.Node) -> fx.Node | None:
    """Return the first reader of `node`, behind casts, views and dropout, with which a compiler would fuse it.

    None where all that read it are matrix products, ops of their own, or the graph's output.
    """
    front = list(node.users)
    seen = set(front)
    while front:
        reader = front.pop(0)
        if reader.op == "output" or is_product(reader):
            continue
        target: Any = reader.target
        is_moved = reader.op == "call_function" and target in LAYOUT
        if not is_moved and op_name(reader) != "dropout":
            return reader
        front.extend(user for user in reader.users if user not in seen)
        seen.update(reader.users)
    return None
