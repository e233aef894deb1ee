"""Changing a graph so that nodes keep their provenance, and no gradient is summed in another order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxopt.graph.aliases import Aliases
from fxopt.graph.torch_private import SET_GRAD

PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack")
NO_GRAD = "no_grad"
"""Noted in the meta of nodes that run with gradients off: a view made so says that it needs one all the same."""


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy whose nodes have names and meta of their own, over the same attributes."""
    return fx.GraphModule(gm, copy_nodes(gm.graph)[0])


def copy_nodes(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Return a copy of `graph`, and which of its nodes is the copy of which."""
    copied, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        copies[node] = copied.node_copy(node, copies.__getitem__)
    return copied, copies


def move_behind(node: fx.Node) -> None:
    """Move what reads `node`, directly or not, and stands before it, behind it, in the order it stands in."""
    before: set[fx.Node] = set()
    for item in node.graph.nodes:
        if item is node:
            break
        before.add(item)
    moved: set[fx.Node] = {node}
    last = node
    for item in [item for item in node.graph.nodes if item in before]:
        if not moved.isdisjoint(item.all_input_nodes):
            moved.add(item)
            last.append(item)
            last = item


class Editor:
    """Edits of one graph; the origins of removed nodes go, by `finish`, to what replaced them."""

    def __init__(self, graph: fx.Graph, aliases: Aliases, prefix: str = "") -> None:
        self.graph = graph
        self.aliases = aliases
        self._merged: dict[fx.Node, list[str]] = {}
        for node in graph.nodes:
            node.meta.setdefault("origins", frozenset({f"{prefix}{node.name}"}))

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        """Let `by` stand for `node`, which is erased."""
        node.replace_all_uses_with(by)
        if by.op != "placeholder":
            merged = self._merged.setdefault(by, [])
            merged.extend(node.meta["origins"])
            merged.extend(self._merged.pop(node, ()))
        self.graph.erase_node(node)

    def insert_before(
        self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> fx.Node:
        """Return a new node before `node`, with its provenance; a method where `target` is a name."""
        with self.graph.inserting_before(node):
            if isinstance(target, str):
                new = self.graph.call_method(target, args, kwargs)
            else:
                new = self.graph.call_function(target, args, kwargs)
        new.meta = {key: node.meta[key] for key in (*PROVENANCE, NO_GRAD, "origins") if key in node.meta}
        new.meta["example_value"] = value
        return new

    def finish(self) -> None:
        """Put the collected origins on the nodes that stand for them."""
        for node, names in self._merged.items():
            node.meta["origins"] = node.meta["origins"].union(names)
        self._merged.clear()


def num_edges(node: fx.Node, limit: int = 3) -> int:
    """Return how many times `node` is read, counted up to `limit`."""
    count = 0
    for user in node.users:
        count += _num_reads(user, node)
        if count >= limit:
            return limit
    return count


def can_bypass(node: fx.Node, source: fx.Node) -> bool:
    """Return whether readers of `node`, an exact copy of `source`, may read `source` for the same gradients.

    Autograd sums the gradients of a value in the order in which they arrive. Three terms summed in another
    order round differently, and a placeholder may get more terms from outside the graph. A copy that was made with
    gradients off passes none on.
    """
    if not may_need_grad(source):
        return True
    if not may_need_grad(node):
        return False
    edges, others = num_edges(node), num_edges(source) - 1
    if source.op == "placeholder":
        return others == 0 and edges <= 1
    return others == 0 or edges + others <= 2


def fresh_like(value: Tensor) -> Tensor:
    """Return an example value like `value` with a storage of its own."""
    with torch.no_grad():
        fresh = value.detach().new_empty_strided(value.shape, value.stride())
    return fresh.requires_grad_() if value.requires_grad else fresh


def may_need_grad(node: fx.Node) -> bool:
    """Return whether a gradient may flow into `node`; True for what is not one tensor."""
    value = node.meta.get("example_value")
    return not isinstance(value, Tensor) or (value.requires_grad and NO_GRAD not in node.meta)


def note_modes(graph: fx.Graph) -> None:
    """Note at each node whether the graph's own switches have gradients off where it runs."""
    is_off = False
    for node in graph.nodes:
        if node.target is SET_GRAD:
            is_off = not node.args[0]
        elif is_off:
            node.meta[NO_GRAD] = True


def _num_reads(user: fx.Node, node: fx.Node) -> int:
    count = 0

    def visit(item: fx.Node) -> fx.Node:
        nonlocal count
        count += item is node
        return item

    fx.map_arg((user.args, user.kwargs), visit)
    return max(count, 1)
