"""A plan that was made before, given back to be carried out: what of it each block can do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from fxopt.errors import FxoptError
from fxopt.remat.decide import Menu, find_choice, find_shared
from fxopt.remat.figures import Facts
from fxopt.remat.menu import Choice
from fxopt.remat.parts import label_of_rows
from fxopt.remat.step import NOTHING_BESIDE
from fxopt.remat.views import Views
from fxopt.report.plan import Decision, Plan, Residual
from fxopt.report.units import format_bytes

FROZEN = "frozen"
"""The form of a block whose call asks for no gradient: it has no joint graph, and nothing of it waits for backward."""
PADDING = 0.01
"""The share by which values may be larger than planned: statistics of attention are padded to whole tiles."""
CURE = "make one with fxopt.plan(model, memory_budget, example_inputs)"


def menu_of(given: Plan, views: Views, tokens: int, facts: Facts) -> Menu:
    """Return the decisions of `given` that a block can carry out, in their order there.

    Raises:
        FxoptError: the plan was made for another model, or for fewer tokens.
    """
    _check_tokens(given, tokens)
    paths = tuple(path for path, _ in given.layers)
    if paths != facts.paths:
        raise FxoptError(
            f"plan: made for another model, expected {len(facts.paths)} blocks of {facts.model}, "
            f"got {len(paths)} of {given.model}\n{CURE}"
        )
    spread = facts.spread
    in_parts = any(beside != NOTHING_BESIDE for beside in (*spread.blocks, spread.tail))
    asked = given.decisions
    if tokens < given.tokens or views.is_of_any_length:
        asked = tuple(d if views.find_view(d) is not None else as_whole(d) for d in asked)
    found = [
        _find_choice(views, decision, given.tokens, tokens, whole_gradients=not in_parts)
        for decision in asked
    ]
    fitting = [
        (number, decision, choice)
        for number, (decision, choice) in enumerate(zip(asked, found, strict=True))
        if not isinstance(choice, str)
    ]
    if not fitting:
        missing = next(choice for choice in found if isinstance(choice, str))
        raise FxoptError(f"plan: made for another model or lowering, expected for a block {missing}\n{CURE}")
    decisions = tuple(views.decide(choice, decision) for _, decision, choice in fitting)
    numbers = {number: place for place, (number, *_) in enumerate(fitting)}
    choices = tuple(choice for *_, choice in fitting)
    return Menu(choices, decisions, tokens, numbers, find_shared(views.whole))


def as_whole(decision: Decision) -> Decision:
    """Return `decision` for a graph of too few rows, or of any number of them, to run in chunks or to keep some."""
    gone = tuple(r for r in decision.offloaded if r.op != label_of_rows(decision.part_of))
    return dataclasses.replace(decision, chunks=1, part_of="", sixteenths=0, offloaded=gone)


def follows(menu: Menu, given: Plan) -> bool:
    """Return whether the decisions of `menu` divide what those of `given` do."""
    pairs = ((given.decisions[number], menu.decisions[place]) for number, place in menu.numbers.items())
    return all((a.chunks, a.sixteenths) == (b.chunks, b.sixteenths) for a, b in pairs)


def frozen_menu(given: Plan | None) -> Menu:
    """Return the menu of a block of the form FROZEN, which has nothing to decide."""
    nothing = Decision((), (), 0, 0, 0, 0, 0.0, 0.0)
    empty = [n for n, d in enumerate(given.decisions if given else ()) if not (d.saved or d.recomputed)]
    return Menu((), (nothing,), 1, dict.fromkeys(empty, 0))


def _find_choice(
    views: Views, decision: Decision, planned_tokens: int, tokens: int, *, whole_gradients: bool
) -> Choice | str:
    """Return the choice that carries `decision` out, or what was expected for it and what the block has instead."""
    view = views.find_view(decision)
    if view is None:
        asked = f"rows of {decision.part_of}" if decision.part_of else f"{decision.chunks} chunks"
        return f"what it can do, got {asked}"
    choice = find_choice(view.joint, decision)
    if isinstance(choice, str):
        return f"values of its own, got {choice}, which it does not compute"
    made = views.decide(choice, decision)
    return find_difference(decision, made, planned_tokens, tokens, whole_gradients=whole_gradients) or choice


def find_difference(
    planned: Decision, made: Decision, planned_tokens: int, tokens: int, *, whole_gradients: bool = True
) -> str:
    """Return by what a block shows that `planned`, here `made`, is of another model's, "" where by nothing.

    Values have as many items for each token, whatever the batch and the length; and what is saved and the gradients are
    no more than planned.
    """
    here = {residual.op: residual for residual in _values_of(made)}
    for residual in _values_of(planned):
        other = here.get(residual.op)
        if other is None or not _is_per_token(residual, planned_tokens) or not _is_per_token(other, tokens):
            continue
        if other.shape[-1] != residual.shape[-1]:
            return f"{residual.op} of {residual.shape[-1]} items a token, got {other.shape[-1]}"
    sizes = [("saved", *(sum(r.bytes for r in d.saved if not r.shared) for d in (planned, made)))]
    if whole_gradients:
        sizes.append(("of gradients", planned.gradient_bytes, made.gradient_bytes))
    for what, most, size in sizes:
        if size > most * (1 + PADDING):
            return f"at most {format_bytes(most)} {what}, got {format_bytes(size)}"
    return ""


def _values_of(decision: Decision) -> Iterator[Residual]:
    parts = (decision.saved, decision.offloaded, decision.recomputed)
    return (residual for part in parts for residual in part if not residual.shared)


def _is_per_token(residual: Residual, tokens: int) -> bool:
    """Return whether a value has a row for each token, and is no square of them, as scores and masks are."""
    shape = residual.shape
    return len(shape) > 1 and math.prod(shape[:-1]) == tokens and shape[-1] != shape[-2]


def decided_number(given: Plan, menu: Menu, place: int, tokens: int, *, is_known: bool) -> int:
    """Return the number in `menu` of what `given` decided for the block at `place`.

    A block not known yet is taken to be like another one: where that has no such decision, any stands for it until
    its own menu is there.

    Raises:
        FxoptError: the plan was made for another model, or for fewer tokens.
    """
    _check_tokens(given, tokens)
    path, number = given.layers[place]
    if number not in menu.numbers and is_known:
        raise FxoptError(
            f"plan: made for another model, expected for {path} a decision that it can carry out, "
            f"got number {number}\n{CURE}"
        )
    return menu.numbers.get(number, 0)


def _check_tokens(given: Plan, tokens: int) -> None:
    if tokens > given.tokens:
        raise FxoptError(
            f"plan: made for another shape, expected at most {given.tokens} tokens a call, got {tokens}\n{CURE}"
        )
