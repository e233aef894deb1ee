"""What a GPU waits for the host: before a step's first block, and where it runs faster than the host launches.

Measured on the host of an H200 (16 cores) with OLMo2-1B and adapters, 512 tokens, each step waited for: 8.6 ms with two
blocks, 16.3 to 17.9 with six and 21.6 with fourteen, where the GPU has 2, 5 and 10 ms of work; the figures below are
the line of least squares through these. Another host may take half or twice that.
"""

from __future__ import annotations

from collections.abc import Sequence

from fxopt.remat.devices import Device
from fxopt.remat.offload import HOST_PS
from fxopt.report.plan import Decision

AHEAD_MS = 4.2
"""Until the first block runs: tables of positions, masks and guards, while the GPU has next to nothing to do. A step of
4096 tokens through six blocks, all trained, takes so much longer than its kernels."""
AROUND_MS = 9.8
"""What the host takes for all but the blocks: before these, their head, the start of backward, the optimizer."""
BLOCK_MS, SENDING_MS = 0.95, HOST_PS * 1e-9
"""Both passes of a replayed block, and of one that sends values to the host's memory."""


def idle_ms_of(compute_ms: float, decisions: Sequence[Decision], device: Device) -> float:
    """Return what the GPU waits in a step in which it computes for `compute_ms`, by blocks that are replayed.

    The host launches what follows while the GPU is at work, so either the one or the other sets the time.

    >>> from fxopt.remat.devices import find_device
    >>> idle_ms_of(500.0, (), find_device("H100")), idle_ms_of(1.0, (), find_device("H100"))
    (4.2, 8.8)
    """
    if not device.launch_ps:
        return 0.0
    host_ms = AROUND_MS + sum(SENDING_MS if decision.offloaded else BLOCK_MS for decision in decisions)
    return max(AHEAD_MS, host_ms - compute_ms)
