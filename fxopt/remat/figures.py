"""What a plan rests on and what follows from it: the facts of a model, the limit of a budget, the plan as a record."""

from __future__ import annotations

import dataclasses

from fxopt.errors import FxoptError
from fxopt.remat.budget import Budget
from fxopt.remat.choice import Candidates, find_smallest
from fxopt.remat.cost import Declarations
from fxopt.remat.devices import Device
from fxopt.remat.launching import idle_ms_of
from fxopt.remat.measured import ROOFLINES, Measured
from fxopt.remat.step import NOT_SPREAD, UPDATE, Around, Spread, find_peak, simulate_step
from fxopt.report.plan import Decision, Plan, Residual
from fxopt.report.units import format_bytes

UPDATE_PASSES = 7
"""What a fused AdamW moves per byte that it trains: weight, gradient and both moments read, three of them written."""
UPDATE_SHARE = 0.6
"""Of the memory's speed it reaches: 0.57 on an H200 (OLMo2-1B of 6 and 14 blocks) and 0.65 on an H100, in bf16."""
LOWER = 0.9
"""The share of a plan's peak that the next one may have where memory ran out: a smaller step would not be felt."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the planner knows of a model and its device when a plan is made.

    `static_bytes` live all the time, `gradient_bytes` are those that the optimizer is given at a time, of
    `trained_bytes` in all; `tied_bytes` takes the gradient that a parameter used before and after the blocks gets last;
    `free_bytes` is how much may be allocated in all, None where nobody limits it; `host_bytes` how much may wait on the
    host, where that `host_is_asked` for by somebody or not; `spread` what an engine adds that shards the parameters,
    `uncounted` why that is not known; `measured` knows what ops take on the device; whether blocks are `replayed` as
    CUDA graphs, and whether the device `is_assumed`: not the one that the model is on.
    """

    model: str
    paths: tuple[str, ...]
    device: Device
    lowering: str
    static_bytes: int
    gradient_bytes: int
    trained_bytes: int
    free_bytes: int | None
    declared: Declarations
    tied_bytes: int = 0
    host_bytes: int = 0
    host_is_asked: bool = True
    spread: Spread = NOT_SPREAD
    measured: Measured = ROOFLINES
    uncounted: str = ""
    replayed: bool = False
    is_assumed: bool = False


@dataclasses.dataclass(frozen=True)
class Goal:
    """One kind of call that has a plan of its own: up to so many tokens, under one budget.

    `ceiling` is what its peak has to stay below since memory ran out under a plan that needed more.
    """

    tokens: int
    budget: Budget
    ceiling: int | None = None


def find_lower_goal(goal: Goal, plan: Plan) -> Goal | None:
    """Return `goal` for a plan that needs noticeably less than `plan`, None where none does."""
    if plan.peak_bytes <= plan.smallest_bytes:
        return None
    return dataclasses.replace(goal, ceiling=max(plan.smallest_bytes, int(plan.peak_bytes * LOWER)))


def find_limit(goal: Goal, facts: Facts, candidates: Candidates, around: Around) -> tuple[int | None, str]:
    """Return the most bytes that a step of `goal` may allocate, None where nothing limits it, and what to warn of.

    Raises:
        FxoptError: no choice needs so little.
    """
    asked, warning = _limit_asked_for(goal, facts, candidates, around)
    return min((limit for limit in (asked, goal.ceiling) if limit is not None), default=None), warning


def _limit_asked_for(
    goal: Goal, facts: Facts, candidates: Candidates, around: Around
) -> tuple[int | None, str]:
    budget, device = goal.budget, facts.device
    if budget is None:
        return None, ""
    beside = without_update(goal, around)
    smallest = find_smallest(candidates, beside)
    if budget == "min":
        return smallest, ""
    if budget == "auto":
        if facts.free_bytes is None or facts.free_bytes >= smallest:
            return facts.free_bytes, ""
        free, needed = map(format_bytes, (facts.free_bytes, smallest))
        place = f"on an assumed {device.name} " if facts.is_assumed else ""
        return smallest, f"memory_budget='auto': {place}{free} are free, the smallest step needs {needed}"
    assert not isinstance(budget, str)
    limit = int(budget * device.memory_bytes) if isinstance(budget, float) else budget
    if limit > device.memory_bytes and device.bounded:
        asked, there = map(format_bytes, (limit, device.memory_bytes))
        return None, f"memory_budget: {asked} is more than {device.name} has ({there}): treated as unlimited"
    if limit < smallest:
        numbers = candidates.numbers_at(int(candidates.peaks_within(beside).argmin()))
        taken = [menu[number] for menu, number in zip(candidates.menus, numbers, strict=True)]
        peak_at = find_peak(simulate_step(facts.paths, taken, beside)).name
        raise FxoptError(
            f"memory_budget: no plan fits, expected at least {format_bytes(smallest)} ({smallest} bytes), "
            f"got {format_bytes(limit)}\n"
            f"{format_bytes(facts.static_bytes)} of it are weights, buffers and the optimizer's state, "
            f"{_say_rest(peak_at)}"
        )
    return limit, ""


def _say_rest(peak_at: str) -> str:
    if peak_at == UPDATE:
        return (
            "the rest are gradients and what the optimizer's step works on: neither hangs on the batch's size"
        )
    return f"the rest is needed in the {peak_at}; a smaller batch or shorter sequences need less"


def without_update(goal: Goal, around: Around) -> Around:
    """Return `around` for "min" without the optimizer, which is not known: the rest is made smallest by itself."""
    if goal.budget != "min":
        return around
    return dataclasses.replace(around, gradient_bytes=0)


def make_plan(
    facts: Facts,
    goal: Goal,
    limit: int | None,
    smallest: int,
    menus: list[tuple[Decision, ...]],
    numbers: tuple[int, ...],
    around: Around,
) -> Plan:
    """Return the plan in which each block takes the decision of its number."""
    taken = [menu[number] for menu, number in zip(menus, numbers, strict=True)]
    decisions = tuple(dict.fromkeys(taken))
    timeline = simulate_step(facts.paths, taken, around)
    peak = find_peak(timeline)
    recompute_ms = sum(decision.recompute_ms for decision in taken)
    wait_ms = sum(decision.wait_ms for decision in taken)
    update_ms = update_ms_of(facts.trained_bytes, facts.device)
    compute_ms = sum(decision.compute_ms + decision.chunk_ms for decision in (*taken, *around.tail))
    busy_ms = compute_ms + recompute_ms + wait_ms + update_ms
    idle_ms = idle_ms_of(busy_ms, len(taken), facts.device)
    if limit is not None and goal.budget == "min" and goal.ceiling is None:
        limit = max(limit, peak.bytes)  # it is of the blocks alone, whatever the optimizer needs
    return Plan(
        model=facts.model,
        device=facts.device.name,
        lowering=facts.lowering,
        budget=str(goal.budget),
        limit_bytes=limit,
        tokens=goal.tokens,
        decisions=decisions,
        layers=tuple(
            (path, decisions.index(decision)) for path, decision in zip(facts.paths, taken, strict=True)
        ),
        static_bytes=facts.static_bytes,
        smallest_bytes=smallest,
        peak_bytes=peak.bytes,
        peak_at=peak.name,
        step_ms=busy_ms + idle_ms,
        recompute_ms=recompute_ms,
        wait_ms=wait_ms,
        update_ms=update_ms,
        idle_ms=idle_ms,
        measured_ms=sum(decision.measured_ms for decision in (*taken, *around.tail)),
        rooflines=facts.measured.left,
        after=around.tail,
        timeline=timeline,
    )


def update_ms_of(trained_bytes: int, device: Device) -> float:
    """Return what the optimizer's step takes, which waits for memory alone.

    >>> from fxopt.remat.devices import find_device
    >>> round(update_ms_of(2 * 1_236_000_000, find_device("H100")), 1)
    8.6
    """
    return UPDATE_PASSES * trained_bytes / (device.bandwidth * UPDATE_SHARE) * 1e3


def scale_decision(decision: Decision, scale: float) -> Decision:
    """Return `decision` for `scale` times the tokens it was made for; the gradients' bytes do not change."""
    if scale == 1:
        return decision
    return dataclasses.replace(
        decision,
        saved=scale_residuals(decision.saved, scale),
        offloaded=scale_residuals(decision.offloaded, scale),
        offloaded_bytes=int(decision.offloaded_bytes * scale),
        wait_ms=decision.wait_ms * scale,
        saved_bytes=int(decision.saved_bytes * scale),
        forward_bytes=int(decision.forward_bytes * scale),
        backward_bytes=int(decision.backward_bytes * scale),
        compute_ms=decision.compute_ms * scale,
        recompute_ms=decision.recompute_ms * scale,
        chunk_ms=decision.chunk_ms * scale,
        measured_ms=decision.measured_ms * scale,
    )


def scale_residuals(residuals: tuple[Residual, ...], scale: float) -> tuple[Residual, ...]:
    """Return `residuals` with `scale` times their bytes."""
    return tuple(dataclasses.replace(residual, bytes=int(residual.bytes * scale)) for residual in residuals)
