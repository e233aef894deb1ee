"""Where a pattern of a form that the search for sites does not know came near: one miss for each place in a graph."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import fx

from fxopt.graph.view import find_subgraphs
from fxopt.rewriting.legality import read_state
from fxopt.rewriting.matcher import find_matches
from fxopt.rewriting.near_miss import COMMON, find_miss
from fxopt.rewriting.pattern import Match, Mismatch, Pattern
from fxopt.rewriting.rewrite import find_match
from fxopt.rewriting.trace import Bindings, Trace
from fxopt.rewriting.trees import Operation, Target, walk

Place = tuple[Mismatch, fx.Node]
MOST_OF_A_MARK = 4
"""How often an op may be in a graph that marks a pattern: more of them are, say, the products of a block."""


MOST_TRIES = 64
"""Of ways in which a pattern fits a place but for one attribute."""


def find_near_places(
    gm: fx.GraphModule,
    pattern: Pattern,
    lazy_outputs: bool,
    refused: Collection[str] = (),
    taken: Mapping[str, str] | None = None,
) -> list[Place]:
    """Return the nearest miss of each place in `gm`, before any rewrite, that resembles `pattern`, with a node there.

    A place is a run of ops of the pattern. It resembles it where all but one attribute fits, where half of the pattern
    matched, or where it holds the op that is rarest of those that both have. `taken` names for each stock node the
    pattern that rewrote it. Places that `pattern` itself took are left out, and those that descend from a stock node
    in `refused`; of those that fit, and that another pattern took, that is told.
    """
    places: list[Place] = []
    taken = taken or {}
    own = {origin for origin, name in taken.items() if name == pattern.name}
    num_ops = sum(isinstance(term, Operation) for root in pattern.terms for term in walk(root))
    for prefix, body in find_subgraphs(gm):
        state = read_state(body.graph)
        is_lazy = lazy_outputs and not prefix
        counts = {target: len(nodes) for target, nodes in state.by_target.items()}
        marks = _find_marks(pattern, counts)
        covered = {node for node in body.graph.nodes if not own.isdisjoint(_origins(node))}
        roots = [node for node in body.graph.nodes if node.target in pattern.terms[0].heads]
        matched: set[fx.Node] = set()
        for root in roots:
            match = find_match(pattern, root, root, state, is_lazy, Trace(pattern.name, known={}))
            if match is None:
                continue
            matched.add(root)
            if covered.isdisjoint(match.nodes) and (by := _find_taker(match, taken)):
                covered.update(match.nodes)
                reason = f"{by} took ops of this form, expected this pattern first; put it before"
                places.append((Mismatch(pattern.name, reason, (), len(match.nodes)), root))
        for bindings, node in _find_almost(pattern, roots):
            is_refused = any(not _origins(inner).isdisjoint(refused) for inner in bindings.nodes)
            if bindings.forgiven is not None and covered.isdisjoint(bindings.nodes) and not is_refused:
                covered.update(bindings.nodes)
                reason, failed = bindings.forgiven
                miss = Mismatch(pattern.name, reason, (failed,), len(bindings.nodes), True, True)
                places.append((miss, node))
        for run in _find_runs(body.graph.nodes, pattern.targets, covered):
            if any(not _origins(node).isdisjoint(refused) for node in run):
                continue
            found = ((find_miss(pattern, node, state, is_lazy, True), node) for node in run)
            misses = [
                (miss, node) for miss, node in found if miss is not None and matched.isdisjoint(miss.nodes)
            ]
            if misses:
                nearest = max(misses, key=lambda item: (item[0].progress, item[0].nearness))
                half = nearest[0].progress > 1 and num_ops <= 2 * nearest[0].progress
                if half or any(node.target in marks for node in run):
                    places = _with_place(places, nearest)
    return places


def _origins(node: fx.Node) -> frozenset[str]:
    return node.meta.get("origins", frozenset({node.name}))


def _find_taker(match: Match, taken: Mapping[str, str]) -> str:
    """Return the name of the pattern that rewrote a node of `match`, "" if none did."""
    return next((taken[origin] for origin in sorted(match.origins) if origin in taken), "")


def _find_almost(pattern: Pattern, roots: Iterable[fx.Node]) -> Iterator[tuple[Bindings, fx.Node]]:
    """Yield the largest match but for one attribute at each of `roots`, and the root; none where there is a match."""
    for root in roots:
        trace = Trace(pattern.name, forgives=True)
        tries = [found for found, _ in itertools.islice(find_matches(pattern, root, trace), MOST_TRIES)]
        if tries and all(found.forgiven is not None for found in tries):
            yield max(tries, key=lambda found: len(found.nodes)), root


def _with_place(places: list[Place], found: Place) -> list[Place]:
    """Return `places` with one more; those that fail at the same nodes are the two sides of one place."""
    same = [place for place in places if not set(place[0].nodes).isdisjoint(found[0].nodes)]
    others = [place for place in places if place not in same]
    return [*others, max(*same, found, key=lambda place: place[0].progress) if same else found]


def _find_marks(pattern: Pattern, counts: dict[Target, int]) -> set[Target]:
    present = {target: counts[target] for target in pattern.targets - COMMON if counts.get(target)}
    fewest = min(present.values(), default=0)
    return {target for target, count in present.items() if count == fewest <= MOST_OF_A_MARK}


def _find_runs(
    nodes: Iterable[fx.Node], targets: frozenset[Target], but: Collection[fx.Node]
) -> Iterator[list[fx.Node]]:
    """Yield nodes of these ops, those together that read each other; those in `but` are in none."""
    run_of: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        if node.op != "call_function" or node.target not in targets or node in but:
            continue
        joined = [node]
        for source in node.all_input_nodes:
            if source in run_of and run_of[source] is not joined:
                joined = [*run_of[source], *joined]
                run_of.update(dict.fromkeys(joined, joined))
        run_of.update(dict.fromkeys(joined, joined))
    yield from {id(run): run for run in run_of.values()}.values()
