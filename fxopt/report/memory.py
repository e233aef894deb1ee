"""What lives at the instants of a planned step, and what holds the peak: computed from the plan's record alone."""

from __future__ import annotations

import dataclasses

from fxopt.report.plan import Decision, Instant, Plan, Residual
from fxopt.report.units import format_bytes

PARTS = ("static", "saved", "moving", "gradients", "running")
TITLES = {
    "static": "weights, buffers and the optimizer's state",
    "saved": "saved for backward by blocks that wait",
    "moving": "on the way to the host or back",
    "gradients": "gradients of parameters",
    "running": "what the running block works on",
}
UPDATE_TITLE = "what the optimizer works on"


@dataclasses.dataclass(frozen=True)
class Holding:
    """One part of what lives at an instant; `key` is one of `PARTS`."""

    key: str
    title: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class SavedValue:
    """One residual that waits for backward in `blocks` blocks at once, and the bytes of all of them."""

    residual: Residual
    blocks: int
    bytes: int


def readable_budget(plan: Plan) -> str:
    """Return what was asked for as its reader would write it: bytes in a unit, all else as it is."""
    return format_bytes(int(plan.budget)) if plan.budget.isdigit() else plan.budget


def describe_budget(plan: Plan) -> str:
    """Return what was asked for and what it comes to, in words."""
    asked = f"memory budget {readable_budget(plan)}"
    if plan.limit_bytes is not None and plan.limit_bytes <= plan.smallest_bytes:
        return f"{asked}: as little as possible, {format_bytes(plan.limit_bytes)}"
    if plan.limit_bytes is None:
        return f"{asked}: the fastest step, whatever it needs"
    return f"{asked}: the fastest step within {format_bytes(plan.limit_bytes)}"


def find_peak(plan: Plan) -> int | None:
    """Return the place in the timeline at which most lives, None where the plan has no timeline."""
    places = range(len(plan.timeline))
    return max(places, key=lambda place: plan.timeline[place].bytes, default=None)


def find_holdings(plan: Plan, instant: Instant) -> tuple[Holding, ...]:
    """Return the parts of what lives at `instant`, all of `PARTS`; together they are its bytes."""
    sizes = (instant.saved_bytes, instant.moving_bytes, instant.gradient_bytes, instant.running_bytes)
    titles = {**TITLES, "running": UPDATE_TITLE} if instant is plan.timeline[-1] else TITLES
    rest = instant.bytes - sum(sizes)
    if rest > plan.static_bytes:
        titles = {**titles, PARTS[0]: f"{titles[PARTS[0]]}, what is there for all blocks"}
    return tuple(Holding(key, titles[key], size) for key, size in zip(PARTS, (rest, *sizes), strict=True))


def find_saved(plan: Plan, place: int) -> tuple[SavedValue, ...]:
    """Return what blocks that wait hold for backward at the instant `place`, the largest first."""
    regions: list[Decision] = [*(plan.decisions[number] for _, number in plan.layers), *plan.after]
    passed = min(place, max(2 * len(regions) - 1 - place, 0))
    found: dict[Residual, int] = {}
    for decision in regions[:passed]:
        for residual in decision.saved:
            found[residual] = found.get(residual, 0) + 1
    values = (
        SavedValue(residual, blocks, residual.bytes * (1 if residual.shared else blocks))
        for residual, blocks in found.items()
    )
    return tuple(sorted(values, key=lambda value: -value.bytes))
