"""Which inputs a captured graph writes to."""

from __future__ import annotations

from torch import fx

from fxopt.graph.aliases import Aliases
from fxopt.graph.purity import mutated_inputs


def find_mutated_inputs(gm: fx.GraphModule) -> tuple[fx.Node, ...]:
    """Return the placeholders that a node of `gm` may write to, directly or through a view."""
    aliases = Aliases(gm.graph)
    written: set[int] = set()
    for node in gm.graph.nodes:
        for target in mutated_inputs(node):
            written |= aliases.keys_of(target)
    return tuple(
        node
        for node in gm.graph.find_nodes(op="placeholder")
        if not written.isdisjoint(aliases.keys_of(node))
    )
