"""Where a match may be: from the nodes of a pattern's rarest op up to what may be its first output.

So a sweep looks at a few nodes of a graph, and its work grows with the graph and no faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx

from fxopt.rewriting.pattern import Pattern
from fxopt.rewriting.prefilter import Known, could_match
from fxopt.rewriting.trees import Either, Many, Operation, Target, Term, children_of

MOST_READERS = 16


def find_rare_ops(term: Term, counts: Mapping[Target, int]) -> frozenset[Target] | None:
    """Return the ops, one of which every match contains, that are rarest in a graph of these `counts`.

    None where a match may contain no op at all.
    """
    best = _cheapest_cover(term, counts, {})
    return None if best is None else best[1]


Cover = tuple[int, frozenset[Target]]


def _cheapest_cover(term: Term, counts: Mapping[Target, int], known: dict[int, Cover | None]) -> Cover | None:
    if id(term) in known:
        return known[id(term)]
    best: Cover | None
    covers = [_cheapest_cover(child, counts, known) for child in children_of(term)]
    if isinstance(term, Many) and not term.at_least:
        best = None
    elif isinstance(term, Either):
        if any(cover is None for cover in covers):
            best = None
        else:
            targets = frozenset[Target]().union(*(cover[1] for cover in covers if cover is not None))
            best = (sum(counts.get(target, 0) for target in targets), targets)
    else:
        found = [cover for cover in covers if cover is not None]
        if isinstance(term, Operation):
            found.append((counts.get(term.target, 0), frozenset({term.target})))
        best = min(found, key=lambda cover: cover[0], default=None)
    known[id(term)] = best
    return best


def find_climbing_terms(term: Term, rare_ops: frozenset[Target]) -> tuple[Operation, ...]:
    """Return the operations on the ways from a rare op up to the output of a match, both included."""
    climbing: dict[int, Operation] = {}
    known: dict[int, bool] = {}

    def leads(current: Term) -> bool:
        if id(current) not in known:
            below = [leads(child) for child in children_of(current)]
            found = any(below) or (isinstance(current, Operation) and current.target in rare_ops)
            if found and isinstance(current, Operation):
                climbing[id(current)] = current
            known[id(current)] = found
        return known[id(current)]

    leads(term)
    return tuple(climbing.values())


def climb(start: fx.Node, num_levels: int, may_climb: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Return `start`'s users, their users and so on, as far as `may_climb` goes; the furthest first.

    Nothing with more than `MOST_READERS` users is climbed over, nor more than that many nodes per level: a
    value read so widely is no intermediate of one match.
    """
    reached: dict[fx.Node, None] = {}
    level = [start]
    for _ in range(num_levels):
        users = [user for node in level if len(node.users) <= MOST_READERS for user in node.users]
        found = [user for user in dict.fromkeys(users) if user not in reached and may_climb(user)]
        level = found[:MOST_READERS]
        reached.update(dict.fromkeys(level))
    return list(reversed(reached))


def find_roots(pattern: Pattern, start: fx.Node, may_climb: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Return the nodes that may be the first output of a match that contains `start`, the furthest first.

    `may_climb` says which nodes may stand between the two.
    """
    candidates = [*climb(start, pattern.depth, may_climb), start]
    heads = pattern.terms[0].heads
    return [node for node in candidates if node.target in heads]


def make_climb_test(terms: Iterable[Operation], known: Known) -> Callable[[fx.Node], bool]:
    """Return a test of nodes: whether one could be matched by one of `terms`."""
    by_target: dict[Target, list[Operation]] = {}
    for term in terms:
        by_target.setdefault(term.target, []).append(term)

    def may_climb(node: fx.Node) -> bool:
        target: Any = node.target
        return any(could_match(term, node, known) for term in by_target.get(target, ()))

    return may_climb
