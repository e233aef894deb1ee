"""Host memory for values that leave a device: reserved before it is needed, pinned for a GPU, given out in pieces.

Memory pinned on the fly stops a GPU for milliseconds, so pieces are cut from a few large chunks.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import weakref
from collections.abc import Callable, Iterable
from typing import cast

import torch

from fxopt.capture.landing import Landing
from fxopt.capture.pinned import pin, unpin

CHUNK = 1 << 30
"""The least that is pinned at once, in bytes, unless less may be."""
LARGEST_CHUNK = 1 << 34
"""Of more that is needed some may be pinned, though the driver refuses the rest."""
ROUNDING = 512


class Lane:
    """Where one device's copies from and to the host run, and where those from the host land."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.landing = Landing(device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.Event | None:
        """Copy to the first from the second of each pair, after what the device was asked; return when it is done."""
        with torch.no_grad():
            if self.stream is None:
                for target, source in pairs:
                    target.copy_(source)
                return None
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                for target, source in pairs:
                    target.copy_(source, non_blocking=True)
                return cast("torch.cuda.Event", self.stream.record_event())

    def synchronize(self) -> None:
        """Wait until all copies are done."""
        if self.stream is not None:
            self.stream.synchronize()


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a chunk."""

    chunk: int
    start: int
    size: int


class HostMemory:
    """The memory of one model on the host; `find_bounds` says how much its plans need, and how much it may have."""

    def __init__(self, find_bounds: Callable[[], tuple[int, int]], tell: Callable[[str], None]) -> None:
        self._find_bounds = find_bounds
        self._tell = tell
        self._chunks: list[torch.Tensor] = []
        self._pinned: list[torch.Tensor] = []
        self._lanes: dict[torch.device, Lane] = {}
        # Not at the end of the process, which gives up all its memory anyway.
        weakref.finalize(self, _unpin_all, self._pinned, self._lanes, os.getpid()).atexit = False
        self._free: list[list[tuple[int, int]]] = []
        self._released: collections.deque[Piece] = collections.deque()
        self._used = 0

    @property
    def reserved_bytes(self) -> int:
        """What the chunks come to."""
        return sum(chunk.numel() for chunk in self._chunks)

    @property
    def used_bytes(self) -> int:
        """What the pieces come to that are given out."""
        self._sweep()
        return self._used

    def take(self, num_bytes: int, *, pinned: bool) -> Piece | None:
        """Return a piece of that many bytes, or None where all are taken: said once."""
        size = -(-num_bytes // ROUNDING) * ROUNDING
        self._sweep()
        piece = self._cut(size)
        if piece is None:
            self._reserve(size, pinned=pinned)
            piece = self._cut(size)
        if piece is None:
            self._tell(
                "offload: the host memory of the plan is taken, by graphs whose backward has not run say: what finds "
                "no place stays on the device"
            )
            return None
        self._used += piece.size
        return piece

    def bytes_of(self, piece: Piece, num_bytes: int) -> torch.Tensor:
        """Return the first `num_bytes` of a piece, as bytes."""
        return self._chunks[piece.chunk][piece.start : piece.start + num_bytes]

    def lane_of(self, device: torch.device) -> Lane:
        """Return where the copies of `device` run."""
        if device not in self._lanes:
            self._lanes[device] = Lane(device)
        return self._lanes[device]

    def release(self, piece: Piece) -> None:
        """Take `piece` back; may be called from any thread, at any time.

        A copy of it may be under way: the next one runs behind that, unless there is another device.
        """
        if len(self._lanes) > 1:
            for lane in self._lanes.values():
                lane.synchronize()
        self._released.append(piece)

    def _reserve(self, size: int, *, pinned: bool) -> None:
        """Reserve what the plans need, and a chunk for a piece of `size` at least, if that may be."""
        needed, limit = self._find_bounds()
        missing = max(needed - self.reserved_bytes, size)
        while missing > 0:
            wanted = max(size, min(max(missing, CHUNK), LARGEST_CHUNK)) if pinned else missing
            wanted = min(wanted, limit - self.reserved_bytes)
            chunk = self._allocate(wanted, pinned=pinned) if wanted >= size else None
            if chunk is None:
                return
            self._chunks.append(chunk)
            self._free.append([(0, chunk.numel())])
            missing -= chunk.numel()

    def _allocate(self, size: int, *, pinned: bool) -> torch.Tensor | None:
        if pinned:
            try:
                memory = pin(size)
                self._pinned.append(memory)
                return memory
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                self._tell(
                    f"offload: {size} bytes of host memory could not be pinned ({reason}): transfers "
                    "wait until they are done"
                )
        try:
            return torch.empty(size, dtype=torch.uint8)
        except (RuntimeError, MemoryError) as error:
            reason = str(error).partition("\n")[0]
            self._tell(f"offload: the host has no {size} bytes ({reason}): values stay on the device")
            return None

    def _cut(self, size: int) -> Piece | None:
        for number, free in enumerate(self._free):
            for place, (start, length) in enumerate(free):
                if length >= size:
                    rest = [(start + size, length - size)] if length > size else []
                    free[place : place + 1] = rest
                    return Piece(number, start, size)
        return None

    def _sweep(self) -> None:
        while self._released:
            self._put_back(self._released.popleft())

    def _put_back(self, piece: Piece) -> None:
        self._used -= piece.size
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free[piece.chunk], (piece.start, piece.size)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = merged[-1][0], merged[-1][1] + length
            else:
                merged.append((start, length))
        self._free[piece.chunk] = merged


def _unpin_all(pinned: list[torch.Tensor], lanes: dict[torch.device, Lane], process: int) -> None:
    """Unpin what is dropped, when all copies are done; a process that was forked has no driver to ask."""
    if not pinned or os.getpid() != process:
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        _KEPT.extend(pinned)  # nothing may be waited for now
        return
    for lane in lanes.values():
        lane.synchronize()
    for memory in pinned:
        unpin(memory)


_KEPT: list[torch.Tensor] = []
"""Pinned memory that was dropped while a CUDA graph was captured: it stays pinned."""
