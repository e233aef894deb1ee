"""The multiple-choice knapsack over layers, exactly: one option each, the least time whose bytes fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Option:
    """One point of a layer's menu: the bytes it keeps, the picoseconds it costs, and its bytes on the host."""

    bytes: int
    cost: int
    host: int = 0


def choose(menus: Sequence[Sequence[Option]], capacity: int) -> tuple[int, ...] | None:
    """Return the number of one option per menu, of the least cost within `capacity` bytes, or None.

    >>> menu = (Option(10, 0), Option(4, 7))
    >>> choose((menu, menu), 14), choose((menu, menu), 7)
    ((1, 0), None)
    """
    best: tuple[int, tuple[int, ...]] | None = None
    for numbers in find_front(menus, capacity):
        cost = sum(menu[number].cost for menu, number in zip(menus, numbers, strict=True))
        if best is None or cost < best[0]:
            best = cost, numbers
    return best and best[1]


def find_front(menus: Sequence[Sequence[Option]], capacity: int | None = None) -> list[tuple[int, ...]]:
    """Return every choice of one option per menu that no other beats in bytes, cost and host bytes, by rising bytes.

    The sums are kept layer by layer, and nothing is rounded. Those that cannot end within `capacity` are dropped.
    """
    rest = [0]
    for menu in reversed(menus):
        rest.append(rest[-1] + min(option.bytes for option in menu))
    rest.reverse()
    sums: list[tuple[int, int, int]] = [(0, 0, 0)]
    steps: list[list[int]] = []
    for number, menu in enumerate(menus):
        extended = sorted(
            (size + option.bytes, cost + option.cost, host + option.host, choice * len(sums) + place)
            for choice, option in enumerate(menu)
            for place, (size, cost, host) in enumerate(sums)
        )
        sums = []
        step: list[int] = []
        best: list[tuple[int, int]] = []
        for size, cost, host, made_of in extended:
            if capacity is not None and size + rest[number + 1] > capacity:
                break
            if not any(c <= cost and h <= host for c, h in best):
                best = [(c, h) for c, h in best if c < cost or h < host] + [(cost, host)]
                sums.append((size, cost, host))
                step.append(made_of)
        if not sums:
            return []
        steps.append(step)
    return [_trace(steps, place) for place in range(len(sums))]


def _trace(steps: list[list[int]], place: int) -> tuple[int, ...]:
    """Return the options whose sum stands at `place` after the last step."""
    chosen: list[int] = []
    for number in reversed(range(len(steps))):
        before = len(steps[number - 1]) if number else 1
        option, place = divmod(steps[number][place], before)
        chosen.append(option)
    return tuple(reversed(chosen))
