"""Equal nodes computed once, where no gradient flows: with one, its terms would be summed before the op's
derivative instead of after it, which rounds differently."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.graph.aliases import Aliases
from fxopt.graph.edit import Editor
from fxopt.graph.purity import is_pure
from fxopt.graph.view import tensors_of


def merge_equal_nodes(editor: Editor) -> None:
    """Merge pure nodes that compute the same from the same values, within a stretch of pure nodes.

    Nothing is merged across a node that is not pure (a random op, a write, a switch of autocast or of the
    gradient mode), nor into memory that is written to or returned.
    """
    known: dict[Any, fx.Node] = {}
    for node in editor.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if not is_pure(node):
            known.clear()
        elif _can_merge(node, editor.aliases):
            first = known.setdefault(_key(node), node)
            if first is not node:
                editor.replace(node, first)


def _can_merge(node: fx.Node, aliases: Aliases) -> bool:
    if aliases.is_returned(node) or aliases.is_mutated(node):
        return False
    return not any(tensor.requires_grad for tensor in tensors_of(node))


def _key(node: fx.Node) -> tuple[Any, ...]:
    return node.op, node.target, _frozen(node.args), _frozen(node.kwargs)


def _frozen(item: Any) -> Any:
    """Return a hashable stand-in for an argument; 1, 1.0 and True, 0.0 and -0.0 are different."""
    if isinstance(item, fx.Node):
        return item
    if isinstance(item, list | tuple):
        return type(item).__name__, tuple(map(_frozen, item))
    if isinstance(item, dict):
        return "dict", tuple(sorted((name, _frozen(value)) for name, value in item.items()))
    if isinstance(item, slice):
        return "slice", _frozen(item.start), _frozen(item.stop), _frozen(item.step)
    return type(item).__name__, repr(item)
