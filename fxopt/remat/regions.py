"""The part of a block that may run on some rows at a time and is worth it: what is around its widest values.

An MLP is found so, by dataflow: its values between two linear layers are wider than what it reads and returns, and
every op that touches one treats rows apart, forward and backward.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx

from fxopt.graph.backward import find_backward
from fxopt.graph.torch_private import schema_of
from fxopt.remat.cost import Declarations, bytes_in, op_of, tensors_in
from fxopt.remat.rows import SAME, SHAPED, Rows, read_rows

SHARE = 0.5
"""A region is divided beside the widest one where its wide values have this share of that one's bytes."""


class Region:
    """Nodes that run on some rows at a time: `forward` in one loop over these, `backward` in another."""

    def __init__(self, nodes: Iterable[fx.Node], backward: set[fx.Node]) -> None:
        ordered = sorted(nodes)
        self.forward = [node for node in ordered if node not in backward]
        self.backward = [node for node in ordered if node in backward]


def find_regions(graph: fx.Graph, declared: Declarations) -> tuple[list[Region], Rows] | None:
    """Return the regions of a joint graph that may be divided by rows, or None: its sizes change, or there is none."""
    shape = _find_shape(graph)
    if shape is None:
        return None
    rows, backward = read_rows(graph, shape, declared), _find_late(graph)
    finder = _Finder(graph, rows, backward)
    found = [(size, nodes) for size, nodes in finder.grow_all() if nodes]
    most = max((size for size, _ in found), default=0)
    regions = [Region(nodes, backward) for size, nodes in found if size >= SHARE * most]
    return (regions, rows) if regions else None


def _find_late(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes from the first of backward on: some only read what forward computed, and still come later."""
    backward, late = find_backward(graph.nodes), set[fx.Node]()
    for node in graph.nodes:
        if late or (node.op == "call_function" and node in backward):
            late.add(node)
    return late


def _find_shape(graph: fx.Graph) -> tuple[int, ...] | None:
    """Return the shape of the rows that a block hands on: of its first result, but for the last dimension."""
    values = [node.meta.get("val") for node in graph.nodes]
    sizes = [size for value in values for tensor in tensors_in(value) for size in tensor.shape]
    if any(isinstance(size, torch.SymInt) for size in sizes) or any(
        isinstance(v, torch.SymInt) for v in values
    ):
        return None
    result = graph.output_node().args[0][0]  # pyright: ignore
    value = result.meta.get("val") if isinstance(result, fx.Node) else None
    return tuple(value.shape[:-1]) if isinstance(value, torch.Tensor) and value.ndim > 1 else None


class _Finder:
    """Grows regions from wide values: each is joined by all that reads or makes one."""

    def __init__(self, graph: fx.Graph, rows: Rows, backward: set[fx.Node]) -> None:
        self.graph, self.rows, self.backward = graph, rows, backward
        result = graph.output_node().args[0][0]  # pyright: ignore
        self.narrow = bytes_in(result)  # pyright: ignore[reportArgumentType]
        self.wide = {node for node in graph.nodes if node.op == "call_function" and self._is_wide(node)}

    def _is_wide(self, node: fx.Node) -> bool:
        kinds, tensors = self.rows.kinds_of(node), tensors_in(node.meta.get("val"))
        return any(
            kind.is_sliced and value.numel() * value.element_size() > self.narrow
            for kind, value in zip(kinds, tensors, strict=True)
        )

    def components(self) -> list[set[fx.Node]]:
        """Return the wide values with all that reads or makes one, those that have any of it in common together."""
        left, found = set(self.wide), list[set[fx.Node]]()
        while left:
            queue, nodes = [min(left)], set[fx.Node]()
            while queue:
                node = queue.pop()
                if node in nodes:
                    continue
                nodes.add(node)
                if node in self.wide or _is_tuple(node):
                    queue.extend(user for user in node.users if user.op != "output")
                queue.extend(source for source in node.all_input_nodes if source in self.wide)
                if node.target is operator.getitem:
                    queue.extend(node.all_input_nodes)
            left -= nodes
            found.append(nodes)
        return found

    def grow_all(self) -> list[tuple[int, set[fx.Node]]]:
        """Grow each component in turn: none joins what another has, or what reads another's results."""
        components = self.components()
        grown: list[tuple[int, set[fx.Node]]] = []
        for nodes in components:
            others = set[fx.Node]().union(*components, *(found for _, found in grown)) - nodes
            grown.append(self.grow(nodes, others))
        return grown

    def grow(self, nodes: set[fx.Node], others: set[fx.Node]) -> tuple[int, set[fx.Node]]:
        """Return the bytes of the wide values in `nodes`, and `nodes` with what is done to its results at once.

        No nodes where these cannot be divided. None of `others`, nor what reads one, is taken.
        """
        is_returned = any(user.op == "output" for node in nodes & self.wide for user in node.users)
        if is_returned or not all(map(self._is_divisible, nodes)) or not self._is_closed(nodes):
            return 0, set()
        size = sum(bytes_in(node) for node in nodes & self.wide)
        while True:
            joining = {
                user
                for node in nodes
                for user in node.users
                if user not in others and others.isdisjoint(user.all_input_nodes) and self._joins(user, nodes)
            } - nodes
            grown = nodes | joining
            if not joining or not self._is_closed(grown):
                return size, nodes
            nodes = grown

    def _is_divisible(self, node: fx.Node) -> bool:
        return node in self.rows.divisible

    def _joins(self, node: fx.Node, nodes: set[fx.Node]) -> bool:
        """Return whether `node` does something simple to rows that nothing else reads: they need never be whole."""
        op = op_of(node)
        if op is None or not self._is_divisible(node) or not self.rows.kind_of(node).is_sliced:
            return False
        name = schema_of(op).name.partition("::")[2]
        is_simple = op.namespace in ("aten", "prims") and (
            torch.Tag.pointwise in op.tags or name in (*SAME, *SHAPED)
        )
        made = [source for source in node.all_input_nodes if source in nodes]
        is_same_side = all((source in self.backward) == (node in self.backward) for source in made)
        return (
            is_simple
            and is_same_side
            and all(len(s.users) == 1 and self.rows.kind_of(s).is_sliced for s in made)
        )

    def _is_closed(self, nodes: set[fx.Node]) -> bool:
        """Return whether nothing outside hangs on one of `nodes` while another hangs on it, forward or backward."""
        for part in (nodes - self.backward, nodes & self.backward):
            after: set[fx.Node] = set()
            for node in self.graph.nodes:
                from_part = [s for s in node.all_input_nodes if s in part or s in after]
                if node in part:
                    if any(source in after for source in from_part):
                        return False
                elif from_part and (node in self.backward) == (next(iter(part)) in self.backward):
                    after.add(node)
        return True


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), tuple | list)
