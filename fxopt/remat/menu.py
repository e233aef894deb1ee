"""The menu of a block: every best trade of bytes saved against time of recomputation, by minimum cuts.

A value is split into two nodes, joined by an edge of its bytes: a cut through that edge saves it. A cut before the
first node computes it again, and then needs what it is computed from; that edge has its time. One minimum cut finds
the best set for one exchange rate of time against bytes, and the rates are found from the cuts themselves: between
two points of the lower hull lies either a third, or nothing. Capacities are whole numbers, so the hull is exact.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection
from typing import Any

import networkx as nx

from fxopt.remat.dag import Dag

STEPS = 16
"""The smallest value that is a step of its own has this part of the bytes between two choices."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One point of a menu: the values saved, those computed again, and what that costs.

    `offloaded` are those of the saved ones that wait in the host's memory; `bytes` is what stays on the device.
    """

    saved: frozenset[int]
    recomputed: frozenset[int]
    bytes: int
    cost: int
    offloaded: frozenset[int] = frozenset()


def find_menu(dag: Dag) -> tuple[Choice, ...]:
    """Return the choices on the lower hull of time over bytes, the fastest first.

    >>> from fxopt.remat.dag import Value
    >>> x, y = Value("x", (), 4, None), Value("y", (0,), 100, 7)
    >>> [(choice.bytes, choice.cost) for choice in find_menu(Dag((x, y), frozenset({1})))]
    [(100, 0), (4, 7)]
    """
    all_bytes = dag.bytes_of(range(len(dag.values)))
    all_cost = dag.cost_of(range(len(dag.values)))
    fastest = cut(dag, byte_weight=1, cost_weight=all_bytes + 1)
    smallest = cut(dag, byte_weight=all_cost + 1, cost_weight=1)
    return (*_between(dag, fastest, smallest), smallest) if smallest != fastest else (fastest,)


def _between(dag: Dag, left: Choice, right: Choice) -> tuple[Choice, ...]:
    """Return the points of the hull from `left` on, before `right`."""
    if left.bytes <= right.bytes or left.cost >= right.cost:
        return ()
    byte_weight, cost_weight = right.cost - left.cost, left.bytes - right.bytes
    middle = cut(dag, byte_weight=byte_weight, cost_weight=cost_weight)

    def weight(choice: Choice) -> int:
        return choice.bytes * byte_weight + choice.cost * cost_weight

    if weight(middle) >= weight(left):
        return (left,)
    return (*_between(dag, left, middle), *_between(dag, middle, right))


def find_steps(dag: Dag, menu: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """Return choices between neighbours of `menu`: of what only the first saves, the largest values are given up.

    On the way from one neighbour to the other they are no better than a mix of both. Where a block may move so much
    and no more, they may be.

    >>> from fxopt.remat.dag import Value
    >>> x, y = Value("x", (), 4, None), Value("y", (0,), 100, 7)
    >>> z = Value("z", (0,), 100, 7)
    >>> dag = Dag((x, y, z), frozenset({1, 2}))
    >>> [[choice.bytes for choice in found] for found in (find_menu(dag), find_steps(dag, find_menu(dag)))]
    [[200, 4], [104]]
    """
    found: dict[tuple[int, int], Choice] = {}
    for left, right in itertools.pairwise(menu):
        saved = left.saved | right.saved
        given_up = sorted(
            left.saved - right.saved, key=lambda place: (-(dag.values[place].bytes or 0), place)
        )
        for place in given_up[:-1]:
            if (dag.values[place].bytes or 0) * STEPS < left.bytes - right.bytes:
                break
            saved = saved - {place}
            step = make_choice(dag, _met(dag, functools.partial(_is_kept, dag, saved)))
            if step is not None and right.bytes < step.bytes < left.bytes:
                found.setdefault((step.bytes, step.cost), step)
    return tuple(found.values())


def _is_kept(dag: Dag, saved: Collection[int], place: int) -> bool:
    """Return whether a value, or the one that it stands for, is among `saved`."""
    return place in saved or dag.values[place].stands_for in saved


def _met(dag: Dag, is_saved: Callable[[int], bool]) -> set[int]:
    """Return the saved values that a walk back from backward meets: itself reads them, or what it computes again."""
    met: set[int] = set()
    seen: set[int] = set()
    queue = list(dag.needed)
    while queue:
        place = queue.pop()
        if place in seen:
            continue
        seen.add(place)
        if is_saved(place):
            met.add(place)
        else:
            queue.extend(dag.values[place].inputs)
    return met


def cut(dag: Dag, *, byte_weight: int, cost_weight: int) -> Choice:
    """Return the choice with the smallest sum of its weighted bytes and its weighted cost."""
    graph: Any = nx.DiGraph()  # pyright: ignore[reportUnknownVariableType]
    for place, value in enumerate(dag.values):
        into, out = (place, 0), (place, 1)
        if value.bytes is None:
            graph.add_edge(into, out)
        else:
            graph.add_edge(into, out, capacity=value.bytes * byte_weight)
        if value.cost is None:
            graph.add_edge("source", into)
        elif value.cost:
            graph.add_edge("source", into, capacity=value.cost * cost_weight)
        for source in value.inputs:
            graph.add_edge((source, 1), into)
        if place in dag.needed:
            graph.add_edge(out, "sink")
    if not dag.needed:
        return Choice(frozenset(), frozenset(), 0, 0)
    kept: set[Any] = nx.minimum_cut(graph, "source", "sink")[1][0]  # pyright: ignore
    # An edge without capacity may lie on either side of the cut: only what a walk back from backward meets is saved.
    saved = _met(dag, lambda place: (place, 0) in kept)
    found = make_choice(dag, saved)
    assert found is not None, "a cut left a value neither saved nor computed again"
    return found


def make_choice(dag: Dag, saved: Collection[int]) -> Choice | None:
    """Return the choice that saves `saved`, or None where backward cannot be computed from that."""
    kept, recomputed = dag.settle(saved)
    if recomputed is None:
        return None
    return Choice(kept, recomputed, dag.bytes_of(kept), dag.cost_of(recomputed))
