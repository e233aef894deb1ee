"""Detaches and switches of the gradient mode that no gradient can tell: what they hide ends in integers."""

from __future__ import annotations

from torch import Tensor, fx

from fxopt.graph.edit import Editor
from fxopt.graph.names import op_name
from fxopt.graph.purity import MODE_SWITCHES, is_pure
from fxopt.graph.torch_private import SET_GRAD
from fxopt.graph.view import is_tensor, value_of


def remove_idle_grad_switches(graph: fx.Graph) -> None:
    """Remove each stretch's switches whose nodes are pure and lead to integers and flags alone.

    No gradient comes back from these, with the mode on or off: how experts are chosen, say.
    """
    idle = _find_idle(graph)
    start: fx.Node | None = None
    inside: list[fx.Node] = []
    for node in list(graph.nodes):
        if node.target is SET_GRAD and node.args == (False,) and start is None:
            start, inside = node, []
        elif node.target in MODE_SWITCHES:
            is_end = node.target is SET_GRAD and node.args == (True,)
            if start is not None and is_end and all(item in idle and is_pure(item) for item in inside):
                graph.erase_node(node)
                graph.erase_node(start)
            start = None
        elif start is not None:
            inside.append(node)


def remove_idle_detaches(editor: Editor) -> None:
    """Remove what detaches a value of which only integers and flags are computed."""
    idle = _find_idle(editor.graph)
    for node in editor.graph.nodes:
        x = node.args[0] if node.args else None
        if op_name(node) != "detach" or len(node.args) != 1 or node.kwargs or node not in idle:
            continue
        if isinstance(x, fx.Node) and is_tensor(x) and not editor.aliases.is_mutated(node):
            editor.replace(node, x)


def _find_idle(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes through which no gradient can come back: all that is computed of them ends in integers."""
    idle: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if _holds_no_floats(node) or (bool(node.users) and all(user in idle for user in node.users)):
            idle.add(node)
    return idle


def _holds_no_floats(node: fx.Node) -> bool:
    value = value_of(node)
    is_tensor_of_ints = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
    return node.op in ("call_function", "call_method") and (
        is_tensor_of_ints or isinstance(value, bool | int)
    )
