"""What a GPU waits for the host in a step: the longer of the two sets the time, and a CPU waits for nothing."""

from __future__ import annotations

from fxopt.remat.devices import DEVICES, OTHER
from fxopt.remat.launching import AHEAD_MS, AROUND_MS, BLOCK_MS, idle_ms_of

GPU = DEVICES[0]


def test_a_long_step_waits_only_for_its_first_block():
    assert idle_ms_of(500.0, 28, GPU) == AHEAD_MS


def test_a_short_step_takes_what_the_host_takes():
    assert idle_ms_of(2.0, 4, GPU) == AROUND_MS + 4 * BLOCK_MS - 2.0


def test_more_work_never_makes_a_step_shorter():
    steps = [busy / 4 + idle_ms_of(busy / 4, 2, GPU) for busy in range(100)]
    assert steps == sorted(steps)


def test_a_cpu_launches_nothing():
    assert idle_ms_of(1.0, 2, OTHER) == 0.0
