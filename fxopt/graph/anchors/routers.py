"""Routers of mixtures in a stock graph: choices of the largest scores that say which experts a token goes to."""

from __future__ import annotations

from torch import fx

from fxopt.graph.anchors.stock import MAX_DEPTH, MOVING, ROUNDING, is_given, stock_name, tensors_read

STACK_RANK = 3
CHOSEN = 1
"""The place of the ids among what `topk` returns."""


def route_kind(node: fx.Node) -> str:
    """Return "route" if `node` chooses the largest items, and what it chooses is counted or picks matrices, else ""."""
    if stock_name(node) != "topk":
        return ""
    front = [user for user in node.users if stock_name(user) == "getitem" and user.args[1] == CHOSEN]
    seen = set(front)
    for _ in range(MAX_DEPTH):
        users = [(item, user) for item in front for user in item.users if user not in seen]
        if any(stock_name(user) == "histc" or _picks_matrices(user, item) for item, user in users):
            return "route"
        front = [user for item, user in dict.fromkeys(users) if _passes_on(user, item)]
        seen.update(front)
    return ""


def _passes_on(node: fx.Node, ids: fx.Node) -> bool:
    """Return whether `node` holds the same ids in another order, form or dtype.

    A sort returns them and the places where they stood, an `argsort` these places alone, which are no ids.
    """
    if stock_name(node) == "getitem" and stock_name(ids) == "sort":
        return bool(node.args[1] == 0)
    is_first = bool(node.args) and node.args[0] is ids
    return is_first and stock_name(node) in MOVING | ROUNDING | {"sort"}


def _picks_matrices(node: fx.Node, ids: fx.Node) -> bool:
    """Return whether `node` picks matrices of a given stack by `ids`."""
    if stock_name(node) not in ("getitem", "index_select") or not node.args or node.args[0] is ids:
        return False
    sources = tensors_read(node)
    if not sources or sources[0] is ids or not is_given(sources[0]):
        return False
    value = sources[0].meta["example_value"]
    return value.dim() == STACK_RANK and value.is_floating_point()
