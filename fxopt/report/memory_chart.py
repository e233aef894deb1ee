"""The plan's simulated step as a chart of stacked bars: where each part of each instant stands, in a box of its own."""

from __future__ import annotations

import dataclasses
import math

from fxopt.report.memory import Holding, SavedValue, find_holdings, find_peak, find_saved
from fxopt.report.plan import Plan
from fxopt.report.units import format_bytes

WIDTH, HEIGHT = 1000.0, 240.0
MOST_SAVED = 8
"""So many values that wait for backward are listed at the peak, the largest first."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """One instant: its place and width, and of each part its key, top and height; `text` says it in words."""

    x: float
    width: float
    name: str
    bytes: int
    parts: tuple[tuple[str, float, float], ...]
    holdings: tuple[Holding, ...]
    text: str
    is_peak: bool


@dataclasses.dataclass(frozen=True)
class Chart:
    """A step from left to right and memory upwards, in a box of `WIDTH` by `HEIGHT`."""

    plan: Plan
    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    limit: float | None
    turn: float
    peak: Bar
    saved: tuple[SavedValue, ...]


def chart_of(plan: Plan) -> Chart | None:
    """Return the chart of `plan`, None where it has no timeline."""
    place = find_peak(plan)
    if place is None:
        return None
    highest = plan.timeline[place].bytes
    step = _nice_step(highest / 4)
    top = step * math.ceil(highest / step) or 1
    width = WIDTH / len(plan.timeline)
    bars: list[Bar] = []
    for number, instant in enumerate(plan.timeline):
        below, parts = 0, list[tuple[str, float, float]]()
        holdings = find_holdings(plan, instant)
        for holding in holdings:
            below += holding.bytes
            if holding.bytes:
                parts.append((holding.key, HEIGHT * (1 - below / top), HEIGHT * holding.bytes / top))
        told = "\n".join(f"{format_bytes(h.bytes)} {h.title}" for h in holdings if h.bytes)
        text = f"{instant.name}: {format_bytes(instant.bytes)}\n{told}"
        bars.append(
            Bar(
                number * width,
                width,
                instant.name,
                instant.bytes,
                tuple(parts),
                holdings,
                text,
                number == place,
            )
        )
    ticks = tuple(
        (HEIGHT * (1 - step * number / top), format_bytes(step * number))
        for number in range(round(top / step) + 1)
    )
    shown = plan.limit_bytes is not None and plan.limit_bytes <= top
    limit = HEIGHT * (1 - plan.limit_bytes / top) if shown and plan.limit_bytes is not None else None
    turn = (len(plan.layers) + len(plan.after)) * width
    return Chart(plan, tuple(bars), ticks, limit, turn, bars[place], find_saved(plan, place)[:MOST_SAVED])


def _nice_step(size: float) -> int:
    """Return a power of two, or one and a half of it, of bytes that is no less than `size`."""
    power = 2 ** max(0, math.ceil(math.log2(max(size, 1))))
    return power * 3 // 4 if size <= power * 3 // 4 else power
