"""Which part of a joint graph is its backward."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx


def find_backward(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes that depend on a gradient, and those that autograd made while it went back."""
    found: set[fx.Node] = set()
    for node in nodes:
        is_tangent = node.op == "placeholder" and "tangents" in str(node.target)
        made_there = node.op != "placeholder" and node.meta.get("partitioner_tag") == "is_backward"
        if is_tangent or made_there or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found
