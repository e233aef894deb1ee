"""Where values land that come back from the host: memory of a device that is kept, so that each step finds it again.

A CUDA graph reads from where it read when it was recorded, so a block's values have to come back to one place at every
step. Places are taken and given back in the same order at each, and a free one is the first that is free.
"""

from __future__ import annotations

import threading

import torch

ALIGNMENT = 512


class Landing:
    """The places of one device: as many as blocks hold values from the host at once, two in a backward pass."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._places: list[torch.Tensor] = []
        self._taken: set[int] = set()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """What all places come to."""
        return sum(place.numel() for place in self._places)

    def take(self, sizes: list[int]) -> tuple[int, list[torch.Tensor]]:
        """Return the number of a place, and a part of it for each of `sizes`, in bytes.

        The place is `release`d by its number; its memory is reused in the order in which the device was asked.
        """
        with self._lock:
            return self._take(sizes)

    def release(self, number: int) -> None:
        """Take a place back; may be called from any thread, at any time."""
        self._taken.discard(number)

    def _take(self, sizes: list[int]) -> tuple[int, list[torch.Tensor]]:
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] - size // -ALIGNMENT * ALIGNMENT)
        number = next((n for n in range(len(self._places)) if n not in self._taken), len(self._places))
        if number == len(self._places):
            self._places.append(self._allocate(starts[-1]))
        elif self._places[number].numel() < starts[-1]:
            self._places[number] = self._allocate(0)  # the old one is given up first
            self._places[number] = self._allocate(starts[-1])
        self._taken.add(number)
        place = self._places[number]
        return number, [place[start : start + size] for start, size in zip(starts, sizes, strict=False)]

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
