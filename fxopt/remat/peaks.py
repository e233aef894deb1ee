"""The peaks, times and host bytes of many choices at once: `step.peak_bytes` for all of them side by side.

A model of 28 blocks has some hundred thousand choices worth a look; one by one their steps take many seconds. A plan is
made while a graph is traced, where torch's own tensors would be stand-ins: hence numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxopt.remat.step import Around
from fxopt.report.plan import Decision

BATCH = 1 << 16
NONE = -1

Column = NDArray[Any]
"""What all choices have of one block: [choices]."""
Table = NDArray[Any]
"""The number of each block's decision in each choice: [choices, blocks]."""
Menus = Sequence[tuple[Decision, ...]]


def peaks_of(menus: Menus, table: Table, around: Around) -> Column:
    """Return the simulated peak of each choice of `table`: one decision of `menus` per block."""
    return _batched(menus, table, lambda columns: _peaks(columns, around))


def times_of(menus: Menus, table: Table) -> Column:
    """Return the milliseconds that each choice spends on computing again and on waiting for the host."""
    return _batched(menus, table, lambda columns: _sum(columns.of("extra_ms"), np.float64))


def host_bytes_of_all(menus: Menus, table: Table) -> Column:
    """Return the bytes that each choice keeps on the host."""
    return _batched(menus, table, lambda columns: _sum(columns.of("offloaded_bytes"), np.int64))


class _Columns:
    """What the decisions of some choices have, block by block."""

    def __init__(self, menus: Menus, table: Table) -> None:
        self._menus = menus
        self._table = table

    def of(self, field: str) -> Iterator[Column]:
        """Yield of each block what all choices have in `field`."""
        tables = {id(menu): np.array([getattr(d, field) for d in menu]) for menu in self._menus}
        for place, menu in enumerate(self._menus):
            yield tables[id(menu)][self._table[:, place]]


def _batched(menus: Menus, table: Table, compute: Callable[[_Columns], Column]) -> Column:
    starts = range(0, len(table), BATCH)
    return np.concatenate([compute(_Columns(menus, table[start : start + BATCH])) for start in starts])


def _sum(columns: Iterator[Column], dtype: type[Any]) -> Column:
    total: Column = np.zeros((), dtype=dtype)
    for column in columns:
        total = total + column.astype(dtype)
    return total


def _peaks(columns: _Columns, around: Around) -> Column:
    offloaded = list(columns.of("offloaded_bytes"))
    landing = _landing_bytes(offloaded)
    held = around.static_bytes + around.whole_bytes + landing
    most = around.static_bytes + landing + around.gradient_bytes
    before: list[Column] = []
    leaving = np.zeros_like(landing)
    for forward, saved, moved in zip(
        columns.of("forward_bytes"), columns.of("saved_bytes"), offloaded, strict=True
    ):
        before.append(held - moved)
        most = np.maximum(most, held + leaving + forward)
        held, leaving = held + saved, moved
    tail_before: list[Column] = []
    for decision in around.tail:
        tail_before.append(held - decision.offloaded_bytes)
        most = np.maximum(most, held + leaving + decision.forward_bytes)
        held, leaving = held + decision.saved_bytes, np.full_like(leaving, decision.offloaded_bytes)
    gradients = np.zeros_like(landing)
    for decision, start in zip(reversed(around.tail), reversed(tail_before), strict=True):
        most = np.maximum(most, start + gradients + decision.backward_bytes)
        gradients = gradients + decision.gradient_bytes
    backward, own = list(columns.of("backward_bytes")), list(columns.of("gradient_bytes"))
    for place in reversed(range(len(before))):
        most = np.maximum(most, before[place] + gradients + backward[place])
        gradients = gradients + own[place]
    last = max(around.tied_bytes, around.reduced_bytes)
    end = around.static_bytes + around.whole_bytes + landing + gradients + last
    return np.maximum(most, end) if last else most


def _landing_bytes(offloaded: list[Column]) -> Column:
    """Return `step.landing_bytes` of each choice."""
    first, second = np.zeros_like(offloaded[0]), np.zeros_like(offloaded[0])
    held = np.full_like(first, NONE)
    for place in reversed(range(len(offloaded))):
        size = offloaded[place]
        alone = (size > 0) & (held == NONE)
        first = np.where(alone, np.maximum(first, size), first)
        held = np.where(alone, 0, held)
        before = offloaded[place - 1] if place else np.zeros_like(size)
        taken = np.where(before > 0, np.where(held == 0, 1, 0), NONE)
        first = np.where(taken == 0, np.maximum(first, before), first)
        second = np.where(taken == 1, np.maximum(second, before), second)
        held = taken
    return first + second
