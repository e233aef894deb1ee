"""Gated units in a stock graph: an activation of one projection times another projection."""

from __future__ import annotations

from torch import Tensor, fx

from fxopt.graph.anchors.stock import (
    ACTIVATIONS,
    MOVING,
    POINTWISE,
    RESHAPING,
    are_equal,
    is_projection,
    is_scalar,
    stock_name,
    tensors_read,
)


class Gates:
    """Walks a graph in order; knows of each value which one it is a pointwise function of, whether an
    activation lies between, and whether it comes from a projection."""

    def __init__(self) -> None:
        self._source: dict[fx.Node, fx.Node] = {}
        self._is_activated: dict[fx.Node, bool] = {}
        self._is_projected: dict[fx.Node, bool] = {}

    def kind(self, node: fx.Node) -> str:
        """Return "glu" if `node` is a product of an activation and another projected value, else ""."""
        operands = tensors_read(node)
        is_glu = stock_name(node) == "mul" and len(operands) == 2 and self._is_gate_times_up(*operands)
        self._note(node, operands, is_glu)
        return "glu" if is_glu or self._is_packed(node, operands) else ""

    def source_of(self, node: fx.Node) -> fx.Node:
        """Return the value that `node` is a pointwise function of; `node` itself where there is none."""
        return self._source.get(node, node)

    def is_activated(self, node: fx.Node) -> bool:
        """Return whether an activation lies between `node` and its source."""
        return self._is_activated.get(node, False)

    def is_projected(self, node: fx.Node) -> bool:
        """Return whether `node` comes from a projection."""
        return self._is_projected.get(node, False)

    def _is_gate_times_up(self, a: fx.Node, b: fx.Node) -> bool:
        if self._source.get(a, a) is self._source.get(b, b):
            return False
        if not (self._is_activated.get(a, False) or self._is_activated.get(b, False)):
            return False
        are_projected = self._is_projected.get(a, False) and self._is_projected.get(b, False)
        return are_projected and _are_large_alike(a.meta["example_value"], b.meta["example_value"])

    def _is_packed(self, node: fx.Node, operands: list[fx.Node]) -> bool:
        # F.glu halves its input itself.
        return stock_name(node) == "glu" and bool(operands) and self._is_projected.get(operands[0], False)

    def _note(self, node: fx.Node, operands: list[fx.Node], is_glu: bool) -> None:
        name = stock_name(node)
        large = [item for item in operands if not is_scalar(item)]
        sources = {self._source.get(item, item) for item in large}
        if name in POINTWISE | RESHAPING and len(sources) == 1 and not is_glu:
            self._source[node] = sources.pop()
            activated = any(self._is_activated.get(item, False) for item in large)
            self._is_activated[node] = activated or name in ACTIVATIONS
        if is_projection(node):
            self._is_projected[node] = True
        elif name in MOVING or name in POINTWISE:
            if name in MOVING and not large:
                large = [item for item in node.all_input_nodes if item in self._is_projected]
            moved = (
                operands[:1] if name in MOVING and operands else large
            )  # an index or a mask does not count
            self._is_projected[node] = not is_glu and self._inherits(name, moved)

    def _inherits(self, name: str, large: list[fx.Node]) -> bool:
        flags = [self._is_projected.get(item, False) for item in large]
        # A sum with one projection is one (a bias, an adapter); a product of different values is not.
        return any(flags) if name in ("add", "sub") or len(large) == 1 else bool(flags) and all(flags)


def _are_large_alike(a: Tensor, b: Tensor) -> bool:
    if a.dim() != b.dim() or a.dim() == 0 or not (a.is_floating_point() and b.is_floating_point()):
        return False
    if any(not are_equal(left, right) for left, right in zip(a.shape, b.shape, strict=True)):
        return False
    return not (isinstance(a.shape[-1], int) and a.shape[-1] == 1)
