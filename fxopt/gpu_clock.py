"""What single calls take on a GPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fxopt.remat.measured import HOST
from fxopt.remat.timings import Timing

ROUNDS = 3
LOAD_ROWS = 4096
"""So that a product runs longer (0.2 ms on an H100) than the host takes to launch it (0.04 ms)."""
LOAD_MS, WARM_MS = 5.0, 100.0
"""For how long products hold the GPU up before each op that is timed, and before the first one."""
LONG_MS = 50.0
"""An op that runs so long, the host being done in half of it, needs no load and no second look."""
SHORT_MS = 2.0
"""Below it, what the host takes to launch an op would tell more of its time than the GPU does."""
LOADS = 3
"""How many loads are tried: of two, four and eight times what the host takes."""
MOST_PRODUCTS = 500
"""A load is no longer: a stream takes about a thousand launches before the host has to wait."""


class GpuClock:
    """Says what calls take on a GPU: the median of some, one behind the other, behind products that hold the GPU up.

    So the host has launched all of them before the first one runs, but for those that wait for the GPU themselves, and
    its time is not in theirs; and clocks are about those of a step, which brings a GPU to its power limit: on an H200 a
    product of 8192 x 3584 x 18944 takes 1.59 ms by itself and 1.70 ms within a step.
    """

    BYTES = 2 * LOAD_ROWS**2 * 2

    def __init__(self, place: torch.device) -> None:
        self._place = place
        with torch.cuda.device(place):
            self._rows = torch.randn(LOAD_ROWS, LOAD_ROWS, device=place, dtype=torch.bfloat16)
            self._out = torch.empty_like(self._rows)
            self._load(10)
            begin, end = _events()
            begin.record()
            self._load(20)
            end.record()
            end.synchronize()
            self._load_ms = begin.elapsed_time(end) / 20
            self._load(WARM_MS / self._load_ms)

    def __call__(self, call: Callable[[], Any]) -> Timing | str:
        """Return what `call`, which ran before, takes, or why that cannot be seen."""
        with torch.cuda.device(self._place):
            torch.cuda.synchronize(self._place)
            host_ms, alone_ms = self._time_alone(call)
            if alone_ms > LONG_MS and host_ms < alone_ms / 2:
                return Timing(alone_ms)
            times: list[float] = []
            for tries in range(1, LOADS + 1):
                # One that runs for some time is only asked again whether the host can be ahead of it.
                rounds = ROUNDS if tries == 1 or alone_ms <= SHORT_MS else 1
                load_ms = 2**tries * rounds * host_ms
                was_ahead, found = self._time_behind_load(call, rounds, load_ms)
                times = times or found
                if was_ahead:
                    return Timing(statistics.median(found))
                if load_ms > MOST_PRODUCTS * self._load_ms:  # the load was shorter: it shows nothing
                    return HOST
            # No load lets the host be ahead: it waits for the GPU itself, as it will within a step.
            return Timing(statistics.median(times)) if alone_ms > SHORT_MS else HOST

    def _time_alone(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Return how long the host is in `call` where the GPU has nothing else to do, and how long the GPU is."""
        begin, end = _events()
        begin.record()
        started = time.perf_counter()
        call()
        host_ms = (time.perf_counter() - started) * 1e3
        end.record()
        torch.cuda.synchronize(self._place)
        return host_ms, begin.elapsed_time(end)

    def _time_behind_load(
        self, call: Callable[[], Any], rounds: int, load_ms: float
    ) -> tuple[bool, list[float]]:
        """Return whether the host launched all calls before the GPU was done with a load, and what each took there."""
        self._load(min(MOST_PRODUCTS, max(LOAD_MS, load_ms) / self._load_ms))
        events = [_events() for _ in range(rounds)]
        for begin, end in events:
            begin.record()
            call()
            end.record()
        was_ahead = not events[0][0].query()
        torch.cuda.synchronize(self._place)
        return was_ahead, [begin.elapsed_time(end) for begin, end in events]

    def _load(self, times: float) -> None:
        for _ in range(math.ceil(times)):
            torch.mm(self._rows, self._rows, out=self._out)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
