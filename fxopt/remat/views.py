"""A block's joint graph as it is, and as it would be with its widest part in chunks: what each may save and needs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from torch import fx

from fxopt.remat.chunks import NotDivisible, divide
from fxopt.remat.cost import Declarations
from fxopt.remat.decide import MS, Menu, make_decision
from fxopt.remat.joint import Joint
from fxopt.remat.menu import Choice, make_choice
from fxopt.remat.regions import find_regions
from fxopt.report.plan import Decision

log = logging.getLogger("fxopt")
COUNTS = (4, 16)
"""Into how many chunks rows may be divided: each further number is one more for the planner to weigh."""
SMALLEST = 2048
"""Fewer rows are not worth a chunk of their own: weights are read, and decoded, once per chunk."""
WORTHWHILE = 0.97
"""The share of what a block needs with fewer chunks that it may need with more: else something else holds it."""


class Views:
    """Reads one joint graph, whole and in chunks; the graph itself changes only where that is carried out."""

    def __init__(self, graph: fx.Graph, read: Callable[[fx.Graph], Joint], declared: Declarations) -> None:
        self._graph, self._read, self._declared = graph, read, declared
        self._divided: dict[int, tuple[Joint, dict[int, int]] | None] = {}
        self.whole = read(graph)
        found = find_regions(graph, declared)
        num_rows = found[1].count if found else 0
        self.counts = tuple(count for count in COUNTS if num_rows >= count * SMALLEST)
        """Into how many chunks the graph may be divided."""

    @property
    def key(self) -> object:
        """What two graphs share that have one menu."""
        return self.whole.key, self.counts

    def divided(self, count: int) -> tuple[Joint, dict[int, int]] | None:
        """Return the graph in `count` chunks and where in it each forward value of the whole is, or None."""
        if count not in self._divided:
            self._divided[count] = self._divide(count)
        return self._divided[count]

    def _divide(self, count: int) -> tuple[Joint, dict[int, int]] | None:
        if count not in self.counts:
            return None
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self._graph.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        try:
            replaced = divide(graph, count, self._declared)
        except NotDivisible as error:
            log.debug("a block is not divided into %d chunks: %s", count, error)
            return None
        joint = self._read(graph)
        places = {node: place for place, node in enumerate(joint.forward)}
        moved = (replaced.get(copies[node], copies[node]) for node in self.whole.forward)
        return joint, {old: places[new] for old, new in enumerate(moved) if new in places}

    def joint_of(self, decision: Decision) -> Joint | None:
        """Return the graph as `decision` runs it, None where it cannot be run so."""
        if decision.chunks == 1:
            return self.whole
        found = self.divided(decision.chunks)
        return found and found[0]

    def carry_out(self, decision: Decision) -> Joint:
        """Make the graph run as `decision` says, and return it as it is then."""
        if decision.chunks == 1:
            return self.whole
        divide(self._graph, decision.chunks, self._declared)
        return self._read(self._graph)

    def decide(self, choice: Choice, decision: Decision) -> Decision:
        """Return `choice` as plain data where the graph runs in as many chunks as `decision` says."""
        joint = self.joint_of(decision)
        assert joint is not None, "a decision was taken that the graph cannot carry out"
        made = make_decision(joint, choice)
        if decision.chunks == 1:
            return made
        whole_ms = self.whole.compute_cost * MS
        chunk_ms = max(0.0, made.compute_ms - whole_ms)
        return dataclasses.replace(made, compute_ms=whole_ms, chunks=decision.chunks, chunk_ms=chunk_ms)

    def add_chunks(self, menu: Menu) -> Menu:
        """Return `menu` with what each decision needs that computes wide values again, if it does so in chunks."""
        found = list(zip(menu.choices, menu.decisions, strict=True))
        for choice, decision in list(found):
            needed = _working_bytes(decision)
            for count in self.counts:
                chunked = self._move(choice, count)
                if chunked is None:
                    break
                made = self.decide(chunked, dataclasses.replace(decision, chunks=count))
                if _working_bytes(made) <= WORTHWHILE * needed:
                    needed = _working_bytes(made)
                    found.append((chunked, made))
        found.sort(key=lambda pair: pair[1].extra_ms)
        choices, decisions = zip(*found, strict=True)
        return Menu(choices, decisions, menu.tokens)

    def _move(self, choice: Choice, count: int) -> Choice | None:
        """Return `choice` in `count` chunks, None where it saves what is never whole then."""
        found = self.divided(count)
        if found is None or any(place not in found[1] for place in choice.saved):
            return None
        joint, places = found
        moved = make_choice(joint.dag, {places[place] for place in choice.saved})
        if moved is None:
            return None
        gone = frozenset(places[place] for place in choice.offloaded)
        return dataclasses.replace(moved, bytes=joint.dag.bytes_of(moved.saved - gone), offloaded=gone)


def _working_bytes(decision: Decision) -> int:
    return max(decision.forward_bytes, decision.backward_bytes)
