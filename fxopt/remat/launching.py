"""What a GPU waits for the host: before a step's first block, and where it runs faster than the host launches.

Measured on the host of an H200 (16 cores) with OLMo2-1B and adapters, 512 tokens, each step waited for: 8.6 ms with two
blocks, 16.3 to 17.9 with six and 21.6 with fourteen, where the GPU has 2, 5 and 10 ms of work; the figures below are
the line of least squares through these. Another host may take half or twice that.
"""

from __future__ import annotations

from fxopt.remat.devices import Device

AHEAD_MS = 4.2
"""Until the first block runs: tables of positions, masks and guards, while the GPU has next to nothing to do. A step of
4096 tokens through six blocks, all trained, takes so much longer than its kernels."""
AROUND_MS = 9.8
"""What the host takes for all but the blocks: before these, their head, the start of backward, the optimizer."""
BLOCK_MS = 0.95
"""Both passes of a replayed block; one that sends values to the host's memory takes longer, and is longer at work."""


def idle_ms_of(busy_ms: float, num_blocks: int, device: Device) -> float:
    """Return what the GPU waits in a step that keeps it busy for `busy_ms`, of so many blocks that are replayed.

    The host launches what follows while the GPU is at work, so either the one or the other sets the time. Blocks that
    are not replayed take the host longer than is counted.

    >>> from fxopt.remat.devices import find_device
    >>> idle_ms_of(500.0, 28, find_device("H100")), idle_ms_of(1.0, 0, find_device("H100"))
    (4.2, 8.8)
    """
    if not device.launch_ps:
        return 0.0
    return max(AHEAD_MS, AROUND_MS + num_blocks * BLOCK_MS - busy_ms)
