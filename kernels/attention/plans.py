"""Tiles of the Triton kernels, by width of the heads, dtype and device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from fxopt.kernels.attention.call import Call
from fxopt.kernels.launch import next_power_of_two

LARGE_SHARED = (9, 10)  # compute capabilities with 227 KiB of shared memory a block


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps and pipeline stages of one launch."""

    queries: int
    keys: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """The tiles of the three kernels where they do not read a mask."""

    forward: Tiles
    dkeys: Tiles
    dqueries: Tiles


INTERPRETED = Plan(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1))
HOPPER = {
    64: (
        Plan(Tiles(128, 128, 8, 3), Tiles(64, 128, 8, 2), Tiles(128, 64, 8, 3)),
        Plan(Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 3), Tiles(64, 64, 4, 3)),
    ),
    128: (
        Plan(Tiles(128, 128, 8, 2), Tiles(32, 128, 8, 3), Tiles(128, 64, 8, 3)),
        Plan(Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2), Tiles(64, 64, 4, 3)),
    ),
    256: (
        Plan(Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(128, 32, 8, 2)),
        Plan(Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(64, 32, 8, 2)),
    ),
}
"""By the padded width, the likeliest first; all stay in 255 registers a thread and 227 KiB of shared memory. Forward
holds its sums of 128 x width in registers; the gradients of keys hold two of [keys, width], so that the wider the
heads the fewer the keys."""
AMPERE = {
    64: (Plan(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),),
    128: (Plan(Tiles(128, 32, 8, 2), Tiles(32, 64, 8, 2), Tiles(64, 32, 4, 2)),),
    256: (Plan(Tiles(64, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(32, 32, 8, 1)),),
}
"""Fit into the 99 KiB of shared memory of compute capability 8.6 and 8.9."""
FLOAT32 = {
    64: (Plan(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 16, 4, 1)),),
    128: (Plan(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 8, 1)),),
    256: (Plan(Tiles(16, 16, 4, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),),
}
"""Products of float32 in full precision run outside the tensor cores: small tiles, to stay in registers."""

READING = {64: Tiles(32, 32, 4, 1), 128: Tiles(32, 32, 4, 1), 256: Tiles(16, 32, 8, 1)}
"""By the padded width: the tiles of all three kernels where a mask that is no interval has to be read."""


@functools.cache
def plans_for(width: int, dtype: torch.dtype, capability: tuple[int, int]) -> tuple[Plan, ...]:
    """Return the plans worth trying for heads of `width`, the likeliest first.

    >>> plans_for(128, torch.bfloat16, (9, 0))[0].forward
    Tiles(queries=128, keys=128, warps=8, stages=2)
    """
    table = FLOAT32 if dtype == torch.float32 else HOPPER if capability[0] in LARGE_SHARED else AMPERE
    return table[next(known for known in table if known >= next_power_of_two(width))]


def plans_of(call: Call) -> tuple[Plan, ...]:
    """Return the plans worth trying for this call."""
    if call.q.device.type != "cuda":
        return (INTERPRETED,)
    return plans_for(_widest(call), call.q.dtype, torch.cuda.get_device_capability(call.q.device))


def reading_tiles(call: Call) -> Tiles:
    """Return the tiles for reading a mask."""
    if call.q.device.type != "cuda":
        return INTERPRETED.forward
    width = next_power_of_two(_widest(call))
    if call.q.dtype == torch.float32:
        return Tiles(16, 16, 8, 1)
    return READING[next(known for known in READING if known >= width)]


def _widest(call: Call) -> int:
    return max(call.q.shape[-1], call.v.shape[-1])
