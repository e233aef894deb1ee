"""A block's joint graph as it is, with its widest part in chunks, or with rows of a value kept: what each needs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import fx

from fxopt.graph.edit import copy_nodes
from fxopt.remat.chunks import NotDivisible, divide
from fxopt.remat.cost import Declarations, tensors_in
from fxopt.remat.decide import MS, Menu, make_decision
from fxopt.remat.joint import Joint
from fxopt.remat.menu import Choice, make_choice
from fxopt.remat.offload import spare_for, wait_of
from fxopt.remat.parts import find_divisible, keep_rows, label_of_rows, num_rows_of
from fxopt.remat.regions import find_regions
from fxopt.report.plan import SHARES, Decision

log = logging.getLogger("fxopt")
COUNTS = (4, 16)
"""Into how many chunks rows may be divided: each further number is one more for the planner to weigh."""
SMALLEST = 2048
"""Fewer rows are not worth a chunk of their own: weights are read, and decoded, once per chunk."""
WORTHWHILE = 0.97
"""The share of what a block needs with fewer chunks that it may need with more: else something else holds it."""


class View(NamedTuple):
    """A graph as it would be, and where in it each forward value of the whole is."""

    joint: Joint
    places: dict[int, int]

    def move(self, choice: Choice, also: frozenset[int] = frozenset()) -> Choice | None:
        """Return `choice` of the whole as one of this graph, that also keeps values at places here on the host.

        None where it saves what is never whole here.
        """
        if any(place not in self.places for place in choice.saved):
            return None
        moved = make_choice(self.joint.dag, {self.places[place] for place in choice.saved} | also)
        if moved is None:
            return None
        gone = frozenset(self.places[place] for place in choice.offloaded) | also
        return dataclasses.replace(moved, bytes=self.joint.dag.bytes_of(moved.saved - gone), offloaded=gone)


class Views:
    """Reads one joint graph as it is and as it would be; the graph itself changes only where that is carried out."""

    def __init__(self, graph: fx.Graph, read: Callable[[fx.Graph], Joint], declared: Declarations) -> None:
        self._graph, self._read, self._declared = graph, read, declared
        self._views: dict[tuple[int, str, int], View | None] = {}
        self.whole = read(graph)
        found = find_regions(graph, declared)
        num_rows = found[1].count if found else 0
        self.counts = tuple(count for count in COUNTS if num_rows >= count * SMALLEST)
        """Into how many chunks the graph may be divided."""
        self._replays = find_divisible(self.whole, declared)
        values = (value for node in graph.nodes for value in tensors_in(node.meta.get("val")))
        self.is_of_any_length = any(
            isinstance(size, torch.SymInt) for value in values for size in value.shape
        )
        """Whether sizes are known only when it runs."""

    @property
    def key(self) -> object:
        """What two graphs share that have one menu."""
        return self.whole.key, self.counts, tuple(self._replays)

    def find_view(self, decision: Decision) -> View | None:
        """Return the graph as `decision` runs it, None where it cannot be run so."""
        key = decision.chunks, decision.part_of, decision.sixteenths
        if key not in self._views:
            self._views[key] = self._make_view(decision)
        return self._views[key]

    def _make_view(self, decision: Decision) -> View | None:
        if decision.chunks == 1 and not decision.part_of:
            return View(self.whole, {place: place for place in range(len(self.whole.forward))})
        graph, copies = copy_nodes(self._graph)
        try:
            replaced = self._change(graph, decision, copies.__getitem__)
        except NotDivisible as error:
            log.debug("a block does not run as a decision says: %s", error)
            return None
        joint = self._read(graph)
        places = {node: place for place, node in enumerate(joint.forward)}
        moved = (replaced.get(copies[node], copies[node]) for node in self.whole.forward)
        return View(joint, {old: places[new] for old, new in enumerate(moved) if new in places})

    def _change(
        self, graph: fx.Graph, decision: Decision, copy_of: Callable[[fx.Node], fx.Node]
    ) -> dict[fx.Node, fx.Node]:
        """Make `graph`, in which `copy_of` finds the nodes of the whole, run as `decision` says.

        Return what stands for values that are gone.

        Raises:
            NotDivisible: it cannot be run so.
        """
        if decision.chunks > 1:
            if decision.chunks not in self.counts:
                raise NotDivisible("there are too few rows, or no part whose ops treat them apart")
            return divide(graph, decision.chunks, self._declared)
        if decision.part_of not in self._replays or not 0 < decision.sixteenths < SHARES:
            raise NotDivisible(f"no {decision.sixteenths} of {SHARES} rows of {decision.part_of} can be kept")
        replay = copy_of(self.whole.forward[self._replays[decision.part_of]])
        keep_rows(graph, replay, decision.sixteenths, self._declared)
        return {}

    def carry_out(self, decision: Decision) -> Joint:
        """Make the graph run as `decision` says, and return it as it is then."""
        if decision.chunks == 1 and not decision.part_of:
            return self.whole
        self._change(self._graph, decision, lambda node: node)
        return self._read(self._graph)

    def decide(self, choice: Choice, decision: Decision) -> Decision:
        """Return `choice` as plain data where the graph runs as `decision` says, in chunks or with some rows kept."""
        view = self.find_view(decision)
        assert view is not None, "a decision was taken that the graph cannot carry out"
        made = make_decision(view.joint, choice)
        whole_ms = self.whole.compute_cost * MS
        more_ms = max(0.0, made.compute_ms - whole_ms)
        if decision.chunks > 1:
            return dataclasses.replace(made, compute_ms=whole_ms, chunks=decision.chunks, chunk_ms=more_ms)
        return dataclasses.replace(
            made,
            compute_ms=whole_ms,
            recompute_ms=made.recompute_ms + more_ms,
            part_of=decision.part_of,
            sixteenths=decision.sixteenths,
        )

    def add_chunks(self, menu: Menu) -> Menu:
        """Return `menu`, of the whole, with what each decision needs that computes wide values again, in chunks."""
        found = list(zip(menu.choices, menu.decisions, strict=True))
        for choice, decision in list(found):
            needed = _working_bytes(decision)
            for count in self.counts:
                asked = dataclasses.replace(decision, chunks=count)
                view = self.find_view(asked)
                chunked = view and view.move(choice)
                if chunked is None:
                    break
                made = self.decide(chunked, asked)
                if _working_bytes(made) <= WORTHWHILE * needed:
                    needed = _working_bytes(made)
                    found.append((chunked, made))
        return _sorted(found, menu)

    def add_parts(self, menu: Menu) -> Menu:
        """Return `menu` with decisions that leave more to the host: rows of a value computed again, without a wait."""
        found = list(zip(menu.choices, menu.decisions, strict=True))
        for choice, decision in list(found):
            if choice.offloaded and decision.chunks == 1:
                filled = self._fill(choice, decision)
                found += [filled] if filled and filled[1].extra_ms < decision.extra_ms else []
        return _sorted(found, menu)

    def _fill(self, choice: Choice, decision: Decision) -> tuple[Choice, Decision] | None:
        """Return `choice` with as many rows on the host as hide there, of what takes longest to compute again."""
        values = self.whole.dag.values
        again = {
            label: place
            for label, place in self._replays.items()
            if place in choice.recomputed and num_rows_of(self.whole.forward[place]) >= 2 * SMALLEST
        }
        if not again or wait_of(self.whole, choice):
            return None
        label = max(again, key=lambda label: values[again[label]].cost or 0)
        for share in range(spare_for(self.whole, choice, again[label], SHARES), 0, -1):
            asked = dataclasses.replace(decision, part_of=label, sixteenths=share)
            view = self.find_view(asked)
            if view is None:
                return None
            again_here = view.joint.forward[view.places[again[label]]]
            if (again_here in view.joint.measured) != (
                self.whole.forward[again[label]] in self.whole.measured
            ):
                return None  # a time and an estimate are not to be compared
            part = next(
                place
                for place, value in enumerate(view.joint.dag.values)
                if value.label == label_of_rows(label)
            )
            filled = view.move(choice, frozenset({part}))
            if filled is not None and not wait_of(view.joint, filled):
                return filled, self.decide(filled, asked)
        return None


def _sorted(found: list[tuple[Choice, Decision]], menu: Menu) -> Menu:
    """Return `menu` with these choices, the fastest first."""
    found.sort(key=lambda pair: pair[1].extra_ms)
    choices, decisions = zip(*found, strict=True)
    return dataclasses.replace(menu, choices=choices, decisions=decisions, numbers={})


def _working_bytes(decision: Decision) -> int:
    return max(decision.forward_bytes, decision.backward_bytes)
