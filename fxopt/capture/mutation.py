"""Which inputs a captured graph writes to."""

from __future__ import annotations

from torch import fx

from fxopt.graph.aliases import Aliases
from fxopt.graph.purity import is_inplace


def find_mutated_inputs(gm: fx.GraphModule) -> tuple[fx.Node, ...]:
    """Return the placeholders that an in-place node of `gm` writes to, directly or through a view."""
    aliases = Aliases(gm.graph)
    written: set[int] = set()
    for node in gm.graph.nodes:
        first = node.args[0] if node.args else None
        if node.op in ("call_method", "call_function") and isinstance(first, fx.Node) and is_inplace(node):
            written |= aliases.keys_of(first)
    return tuple(
        node
        for node in gm.graph.find_nodes(op="placeholder")
        if not written.isdisjoint(aliases.keys_of(node))
    )
