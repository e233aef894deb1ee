"""From a joint graph to the decisions that its block may take, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fxopt.graph.sizes import number_of
from fxopt.graph.view import location_of
from fxopt.remat.apply import TAG
from fxopt.remat.joint import CHUNK, Joint
from fxopt.remat.liveness import simulate
from fxopt.remat.menu import Choice, find_menu, make_choice
from fxopt.remat.offload import add_offloads, wait_of
from fxopt.report.plan import Decision, Residual

MS = 1e-9
"""Milliseconds in a picosecond."""


@dataclasses.dataclass(frozen=True)
class Menu:
    """The decisions of one form of block, the fastest first, and the choices that carry them out."""

    choices: tuple[Choice, ...]
    decisions: tuple[Decision, ...]
    tokens: int
    numbers: dict[int, int] = dataclasses.field(default_factory=lambda: dict[int, int]())
    """Where the menu holds what a given plan decided: the places of that plan's decisions in it."""
    shared: tuple[Residual, ...] = ()
    """The block's inputs that other blocks read too."""


def make_menu(joint: Joint, tokens: int, *, offloads: bool = False) -> Menu:
    """Return the menu of `joint`, captured in a call of so many tokens: the points of its curve of time over bytes.

    Where it `offloads`, also those that keep values on the host.
    """
    choices = find_menu(joint.dag)
    if offloads:
        choices = add_offloads(joint, choices)
    decisions = tuple(make_decision(joint, choice) for choice in choices)
    return Menu(choices, decisions, tokens, shared=find_shared(joint))


def find_shared(joint: Joint) -> tuple[Residual, ...]:
    """Return the block's inputs that other blocks read too, tables and masks."""
    inputs = (place for place, node in enumerate(joint.forward) if node.op != "call_function")
    return tuple(residual for residual in _residuals(joint, inputs) if residual.shared)


def make_decision(joint: Joint, choice: Choice) -> Decision:
    """Return `choice` as plain data, with what it needs in memory."""
    working = simulate(joint, choice)
    return Decision(
        saved=tuple(_residuals(joint, choice.saved - choice.offloaded)),
        recomputed=_merged(joint, choice.recomputed),
        saved_bytes=working.saved,
        forward_bytes=working.forward,
        backward_bytes=working.backward,
        gradient_bytes=working.gradients,
        compute_ms=joint.compute_cost * MS,
        recompute_ms=choice.cost * MS,
        offloaded=tuple(_residuals(joint, choice.offloaded)),
        offloaded_bytes=working.offloaded,
        wait_ms=wait_of(joint, choice) * MS,
        measured_ms=_measured_cost(joint, choice) * MS,
    )


def _measured_cost(joint: Joint, choice: Choice) -> int:
    """Return the part of what `choice` takes that was timed, computing again among it."""
    again = (place for place in choice.recomputed if joint.forward[place] in joint.measured)
    return joint.measured_cost + joint.dag.cost_of(tuple(again))


def read_tagged(joint: Joint) -> Choice:
    """Return the choice that the tags of a joint graph ask for: what is not tagged for recomputation is saved."""
    values = joint.dag.values
    seen: set[int] = set()
    queue = list(joint.dag.needed)
    while queue:
        place = queue.pop()
        if place in seen:
            continue
        seen.add(place)
        if values[place].cost is not None and _is_recomputed(joint.forward[place], values[place].bytes):
            queue.extend(values[place].inputs)
    saved = {
        p for p in seen if not _is_recomputed(joint.forward[p], values[p].bytes) or values[p].cost is None
    }
    found = make_choice(joint.dag, saved)
    assert found is not None, "tags leave a value neither saved nor computed again"
    return found


def _is_recomputed(node: fx.Node, saved_bytes: int | None) -> bool:
    return saved_bytes is None or node.meta.get(TAG) == CheckpointPolicy.MUST_RECOMPUTE


def find_choice(joint: Joint, decision: Decision) -> Choice | str:
    """Return the choice in `joint` that carries `decision` out, or the first residual that has no place in it."""
    places = {value.label: place for place, value in enumerate(joint.dag.values)}
    wanted = [residual.op for residual in (*decision.saved, *decision.offloaded)]
    missing = next((op for op in wanted if op not in places), None)
    if missing is not None:
        return missing
    saved = {places[op] for op in wanted}
    inputs = {p for p, node in enumerate(joint.forward) if node.op != "call_function"}
    found = make_choice(joint.dag, saved | inputs)
    if found is None:
        parts = (decision.saved, decision.recomputed, decision.offloaded)
        named = {residual.op for part in parts for residual in part}
        return next((value.label for value in joint.dag.values if value.label not in named), "")
    needed = frozenset(place for place in found.saved if place in saved or _is_needed(joint, found, place))
    gone = frozenset(places[residual.op] for residual in decision.offloaded)
    return dataclasses.replace(found, saved=needed, bytes=joint.dag.bytes_of(needed - gone), offloaded=gone)


def _is_needed(joint: Joint, choice: Choice, place: int) -> bool:
    readers = (joint.dag.values[p].inputs for p in choice.recomputed)
    return place in joint.dag.needed or any(place in inputs for inputs in readers)


def _merged(joint: Joint, places: Iterable[int]) -> tuple[Residual, ...]:
    """Return the values at `places` as `_residuals` does, those of one node's chunks as the first of them.

    It has the bytes and the time of all.
    """
    found: dict[Any, Residual] = {}
    for place in sorted(places):
        for residual in _residuals(joint, (place,)):
            of = joint.forward[place].meta.get(CHUNK, place)
            first = found.get(of)
            found[of] = residual if first is None else _sum_of(first, residual)
    return tuple(found.values())


def _sum_of(first: Residual, other: Residual) -> Residual:
    return dataclasses.replace(
        first,
        bytes=first.bytes + other.bytes,
        recompute_ms=first.recompute_ms + other.recompute_ms,
    )


def _residuals(joint: Joint, places: Iterable[int]) -> Iterable[Residual]:
    """Yield the values at `places` that are tensors of their own, the model's weights left out."""
    for place in sorted(places):
        node, value = joint.forward[place], joint.dag.values[place]
        storages = joint.storages[node]
        tensor = node.meta.get("val")
        if value.bytes is None or not isinstance(tensor, torch.Tensor):
            continue
        if node.op != "call_function" and not (set(storages) <= joint.chained | joint.shared):
            continue
        shape = tuple(map(number_of, tensor.shape))
        yield Residual(
            op=value.label,
            shape=shape,
            dtype=str(tensor.dtype).removeprefix("torch."),
            bytes=sum(joint.sizes[storage] for storage in storages),
            recompute_ms=_cost_of(joint, node, place) * MS,
            location=location_of(node),
            shared=set(storages) <= joint.shared,
        )


def _cost_of(joint: Joint, node: fx.Node, place: int) -> int:
    """Return what computing one value again takes: of an op with several results, the op's own."""
    value = joint.dag.values[place]
    if value.cost or not value.inputs or "." not in value.label.rpartition("#")[2]:
        return value.cost or 0
    return joint.dag.values[value.inputs[0]].cost or 0
