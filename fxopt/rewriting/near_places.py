"""Where a pattern of a form that the search for sites does not know came near: one miss for each place in a graph."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import fx

from fxopt.graph import vocabulary
from fxopt.graph.view import find_subgraphs
from fxopt.rewriting.legality import read_state
from fxopt.rewriting.near_miss import find_miss
from fxopt.rewriting.pattern import Mismatch, Pattern, walk
from fxopt.rewriting.trees import Operation, Target

COMMON: frozenset[Target] = frozenset(
    {torch.add, torch.mul, torch.sub, torch.div, operator.getitem, vocabulary.cast, vocabulary.reshape}
)
"""Ops that every model is full of: that one is there says nothing."""
Place = tuple[Mismatch, fx.Node]
MOST_OF_A_MARK = 4
"""How often an op may be in a graph that marks a pattern: more of them are, say, the products of a block."""


def find_near_places(
    gm: fx.GraphModule, pattern: Pattern, lazy_outputs: bool, but: Collection[str] = ()
) -> list[Place]:
    """Return the nearest miss of each place in `gm` that resembles `pattern`, with a node there.

    A place is a run of ops of the pattern. It resembles it where half of the pattern matched, or where it holds the op
    that is rarest of those that both have. Those that descend from a stock node in `but` are left out.
    """
    places: list[Place] = []
    num_ops = sum(isinstance(term, Operation) for root in pattern.terms for term in walk(root))
    for prefix, body in find_subgraphs(gm):
        state = read_state(body.graph)
        counts = {target: len(nodes) for target, nodes in state.by_target.items()}
        marks = _find_marks(pattern, counts)
        for run in _find_runs(body.graph.nodes, pattern.targets):
            if any(not node.meta.get("origins", frozenset({node.name})).isdisjoint(but) for node in run):
                continue
            found = (
                (find_miss(pattern, node, state, lazy_outputs and not prefix, True), node) for node in run
            )
            misses = [(miss, node) for miss, node in found if miss is not None]
            if misses:
                nearest = max(misses, key=lambda item: (item[0].progress, item[0].nearness))
                half = nearest[0].progress > 1 and num_ops <= 2 * nearest[0].progress
                if half or any(node.target in marks for node in run):
                    places = _with_place(places, nearest)
    return places


def _with_place(places: list[Place], found: Place) -> list[Place]:
    """Return `places` with one more; those that fail at the same nodes are the two sides of one place."""
    same = [place for place in places if not set(place[0].nodes).isdisjoint(found[0].nodes)]
    others = [place for place in places if place not in same]
    return [*others, max(*same, found, key=lambda place: place[0].progress) if same else found]


def _find_marks(pattern: Pattern, counts: dict[Target, int]) -> set[Target]:
    present = {target: counts[target] for target in pattern.targets - COMMON if counts.get(target)}
    fewest = min(present.values(), default=0)
    return {target for target, count in present.items() if count == fewest <= MOST_OF_A_MARK}


def _find_runs(nodes: Iterable[fx.Node], targets: frozenset[Target]) -> Iterator[list[fx.Node]]:
    """Yield nodes of these ops, those together that read each other; what a rewrite made is in none."""
    run_of: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        if node.op != "call_function" or node.target not in targets or "rewritten_by" in node.meta:
            continue
        joined = [node]
        for source in node.all_input_nodes:
            if source in run_of and run_of[source] is not joined:
                joined = [*run_of[source], *joined]
                run_of.update(dict.fromkeys(joined, joined))
        run_of.update(dict.fromkeys(joined, joined))
    yield from {id(run): run for run in run_of.values()}.values()
