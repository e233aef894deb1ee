"""Which nodes share memory: read off the storages of the example values."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor, fx

from fxopt.graph.purity import mutated_inputs
from fxopt.graph.storage import UNKNOWN, keys_of


class Aliases:
    """The storages of one graph's values: who holds each, which are written to, returned, or the caller's."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self.holders: dict[int, list[fx.Node]] = defaultdict(list)
        self._keys: dict[fx.Node, frozenset[int]] = {}
        self._mutated: set[int] = {UNKNOWN}
        self._given: set[int] = set()
        self._returned: set[int] = set()
        for node in graph.nodes:
            keys = self.keys_of(node)
            for key in keys:
                self.holders[key].append(node)
            if node.op in ("placeholder", "get_attr"):
                self._given |= keys
            for mutated in mutated_inputs(node):
                self._mutated |= self.keys_of(mutated)
        for node in graph.find_nodes(op="output"):
            for returned in node.all_input_nodes:
                self._returned |= self.keys_of(returned)

    def keys_of(self, node: fx.Node) -> frozenset[int]:
        """Return the storages of the tensors in the value of `node`, as `split` left them."""
        if node not in self._keys:
            self._keys[node] = keys_of(node)
        return self._keys[node]

    def split(self, holders: list[fx.Node]) -> None:
        """Move the example values of `holders`, which share one storage, to a new one that they share."""
        value: Tensor = holders[0].meta["example_value"].detach()
        memory = value.new_empty((value.untyped_storage().nbytes() // value.element_size(),))
        for holder in holders:
            old: Tensor = holder.meta["example_value"]
            moved = memory.as_strided(old.shape, old.stride(), old.storage_offset())
            holder.meta["example_value"] = moved.requires_grad_(old.requires_grad)
            keys = self._keys.pop(holder)
            for key in keys:
                self.holders[key].remove(holder)
        for holder in holders:
            for key in self.keys_of(holder):
                self.holders[key].append(holder)

    def adopt(self, node: fx.Node, like: fx.Node) -> None:
        """Let the value of `node`, which had none, be that of `like`, in the same memory."""
        node.meta["example_value"] = like.meta["example_value"].detach()
        for key in self._keys.pop(node, frozenset()):
            self.holders[key].remove(node)
        for key in self.keys_of(node):
            self.holders[key].append(node)

    def is_mutated(self, node: fx.Node) -> bool:
        """Return whether anything in the graph may write to memory that `node` reads."""
        return not self._mutated.isdisjoint(self.keys_of(node))

    def is_returned(self, node: fx.Node) -> bool:
        """Return whether the graph returns memory that `node` reads."""
        return not self._returned.isdisjoint(self.keys_of(node))

    def is_private(self, *nodes: fx.Node) -> bool:
        """Return whether all `nodes` live in memory that nobody writes to and the caller never sees."""
        return not any(
            self.is_mutated(node) or self.is_returned(node) or not self._given.isdisjoint(self.keys_of(node))
            for node in nodes
        )
