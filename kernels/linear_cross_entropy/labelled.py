"""Which rows have a label, and the chunks of rows to compute, launched before a GPU has said how many these are.

A host that waits for that number leaves the device idle until its next launches arrive. So rows are sorted on the
device, those with a label first, the first chunk is launched, and the number is read after it: the device has work
meanwhile. Where fewer rows than one chunk have a label, that chunk is filled up with others, as rows of zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Chunk(NamedTuple):
    """Some rows to compute: their places among the computed ones, which they are, and those of them without a label."""

    places: slice
    rows: slice | Tensor
    blank: Tensor | None


class Labelled:
    """The rows of `labels` [N] that have a label."""

    def __init__(self, labels: Tensor, ignore_index: int) -> None:
        ignored = labels == ignore_index
        self._blank, self._order = ignored.to(torch.uint8).sort(stable=True)
        num_ignored = ignored.sum()
        self._num_rows = labels.shape[0]
        self._event: torch.cuda.Event | None = None
        self._num_ignored = num_ignored
        if labels.is_cuda:
            self._num_ignored = torch.empty_like(num_ignored, device="cpu", pin_memory=True)
            self._num_ignored.copy_(num_ignored, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @functools.cached_property
    def num_rows(self) -> int:
        """How many rows have a label; waits until the device has counted them."""
        if self._event is not None:
            self._event.synchronize()
        return self._num_rows - int(self._num_ignored)

    @property
    def is_counted(self) -> bool:
        """Whether `num_rows` is known without waiting for work that was launched before."""
        return self._event is None

    def first(self, num_rows: int) -> Chunk:
        """Return the first `num_rows` rows, those with a label before others."""
        places = slice(0, num_rows)
        return Chunk(places, self._order[places], self._blank[places].bool())

    def others(self, start: int, size: int) -> Iterator[Chunk]:
        """Yield the rows with a label from the place `start` on, `size` at a time."""
        is_all = self.num_rows == self._num_rows
        for places in _slices(start, self.num_rows, size):
            yield Chunk(places, places if is_all else self._order[places], None)


def find_chunks(
    labelled: Labelled | None, num_rows: int, first: int, plan: Callable[[int], int]
) -> Iterator[Chunk]:
    """Yield chunks of the rows to compute, all `num_rows` without `labelled`.

    `first` rows are taken before anything is waited for; `plan` says how many to take at a time of so many rows.
    """
    if labelled is None:
        yield from (Chunk(places, places, None) for places in _slices(0, num_rows, plan(num_rows)))
        return
    start = 0
    if not labelled.is_counted:
        start = min(first, num_rows)
        yield labelled.first(start)
        if start == num_rows:
            return
    yield from labelled.others(start, plan(labelled.num_rows - start))


def _slices(start: int, end: int, size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + size, end)) for begin in range(start, end, size))
