"""Which inputs a captured graph writes to, and what reads them."""

from __future__ import annotations

import operator

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fxopt.graph.aliases import Aliases
from fxopt.graph.purity import mutated_inputs
from fxopt.graph.storage import joint_key_of

WRITTEN = "reads_written"
"""Where a node's meta says so; the planner, which computes no such node again, reads it in the joint graph."""


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


def numbers_of_mutated(gm: fx.GraphModule) -> frozenset[int]:
    """Return the numbers, among the inputs of `gm`, of those that it may write to."""
    mutated = find_mutated_inputs(gm)
    return frozenset(n for n, node in enumerate(gm.graph.find_nodes(op="placeholder")) if node in mutated)


def mark_readers(graph: fx.Graph, mutated: frozenset[int]) -> None:
    """Note at the nodes of a joint graph that they read an input of those numbers, directly or through a view.

    The graph is functional: the new values are written after forward. What were computed again in backward would read
    these, and autograd refuses to hand out a saved tensor that was written to.
    """
    inputs = enumerate(graph.find_nodes(op="placeholder"))
    written = frozenset(joint_key_of(node) for number, node in inputs if number in mutated)
    for node in graph.nodes if written else ():
        if any(joint_key_of(source) in written for source in node.all_input_nodes):
            node.meta[WRITTEN] = True
            for each in (node, *(user for user in node.users if user.target is operator.getitem)):
                if "recompute" in each.meta:  # a checkpoint of the model's own has said that it is
                    each.meta["recompute"] = CheckpointPolicy.MUST_SAVE
