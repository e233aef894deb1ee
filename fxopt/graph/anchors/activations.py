"""Ungated activations in a stock graph: an activation on the way from one projection to the next."""

from __future__ import annotations

from torch import fx

from fxopt.graph.anchors.gates import Gates
from fxopt.graph.anchors.stock import (
    ACTIVATIONS,
    MOVING,
    POINTWISE,
    is_projection,
    is_scalar,
    stock_name,
    tensors_read,
)

UNGATED = ACTIVATIONS - {"glu"}
MAX_FORMULA = 16
"""Ops on the longest way through an activation that is written out."""


def activation_kind(node: fx.Node, gates: Gates) -> str:
    """Return "activation" if `node` is one of a projection's result that only projections read, else "".

    A formula written out counts once, by the activation inside it. `gates` has walked as far as `node`.
    """
    large = _large(node)
    if stock_name(node) not in UNGATED or not large:
        return ""
    if gates.is_activated(large[0]) or not gates.is_projected(large[0]):
        return ""
    return "activation" if _leads_to_projections(node, gates.source_of(large[0])) else ""


def _leads_to_projections(node: fx.Node, source: fx.Node) -> bool:
    """Return whether all that reads `node`, through functions of `source` alone, are projections."""
    front, seen, is_read = [node], {node}, False
    while front:
        for user in front.pop().users:
            if is_projection(user):
                is_read = True
            elif user not in seen:
                seen.add(user)
                if not _is_function_of(user, source, MAX_FORMULA):
                    return False
                front.append(user)
    return is_read


def _is_function_of(node: fx.Node, source: fx.Node, depth: int) -> bool:
    if node is source:
        return True
    large = _large(node)
    if depth == 0 or not large or stock_name(node) not in POINTWISE | MOVING:
        return False
    return all(_is_function_of(item, source, depth - 1) for item in large)


def _large(node: fx.Node) -> list[fx.Node]:
    return [item for item in tensors_read(node) if not is_scalar(item)]
