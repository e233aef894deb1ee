"""Switches of the gradient mode that nothing can tell from their absence, removed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fxopt.graph.purity import is_pure
from fxopt.graph.torch_private import SET_GRAD
from fxopt.graph.view import tensors_of


def remove_idle_switches(graph: fx.Graph, mode: bool | None) -> None:
    """Remove switches before which the mode is the same, or after which nothing runs that depends on it.

    `mode` is the one that the graph is entered in, None where that is not known. What the graph leaves it at stays.

    >>> graph = fx.Graph()
    >>> _ = graph.call_function(SET_GRAD, (False,)), graph.call_function(SET_GRAD, (True,))
    >>> remove_idle_switches(graph, True)
    >>> len(graph.nodes)
    0
    """
    scopes = list(_scopes_of(graph))
    for switch, nodes in scopes:
        wanted = bool(switch.args[0])
        is_last = switch is scopes[-1][0]
        if wanted == mode or (not is_last and not any(map(_depends_on_mode, nodes))):
            graph.erase_node(switch)
        else:
            mode = wanted


def _scopes_of(graph: fx.Graph) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Yield each switch, and the nodes that run before the next."""
    switch, nodes = None, list[fx.Node]()
    for node in graph.nodes:
        if node.target is not SET_GRAD:
            nodes.append(node)
            continue
        if switch is not None:
            yield switch, nodes
        switch, nodes = node, []
    if switch is not None:
        yield switch, nodes


def _depends_on_mode(node: fx.Node) -> bool:
    """Return whether `node` may return something else in the other mode."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    return not is_pure(node) or any(map(_may_require_grad, node.all_input_nodes))


def _may_require_grad(node: fx.Node) -> bool:
    return node.op == "get_attr" or any(tensor.requires_grad for tensor in tensors_of(node))
