"""What one call of a block saved for backward: what of it is on the host, and how that comes back in time."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch

from fxopt.capture import torch_tensors
from fxopt.capture.host_memory import HostMemory, Lane, Piece
from fxopt.errors import FxoptError


@dataclasses.dataclass
class Away:
    """One value on the host: its form, its place there, and its storage where that is on the device now."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    num_bytes: int
    piece: Piece
    raw: torch.Tensor | None


class Saved:
    """What autograd holds in place of a saved tensor: the tensor itself, or what tells where it is."""

    def __init__(self, batch: Batch, number: int, tensor: torch.Tensor) -> None:
        self.batch = batch
        self.number = number
        self.held: Any = tensor
        self.writes = torch_tensors.version_of(tensor)

    def give(self) -> torch.Tensor:
        """Return the tensor for backward."""
        self.batch.note_given(self.number)
        if isinstance(self.held, Away):
            return self.batch.fetch(self.held)
        return self.batch.outer[1](self.held)


class Batch:
    """The values that one call of one block saved; `before` is that of the block that ran before."""

    def __init__(self, host: HostMemory, before: Batch | None) -> None:
        top = torch_tensors.top_saved_tensors_hooks()
        self.outer: tuple[Callable[..., Any], Callable[..., Any]] = top or (_same, _same)
        self._host = host
        self._before = None if before is None else weakref.ref(before)
        self._saved: list[Saved] = []
        self._away: list[Away] = []
        self._given: set[int] = set()
        self._lane: Lane | None = None
        self._landed: int | None = None
        self._home: Any = None
        self._left: torch.cuda.Event | None = None
        self._came: torch.cuda.Event | None = None
        self._watched: list[tuple[torch.Tensor, int]] = []
        self._is_written = False

    @property
    def has_left(self) -> bool:
        """Whether any value of this call left the device."""
        return bool(self._away)

    def pack(self, tensor: torch.Tensor) -> Saved:
        """Return what autograd holds in place of `tensor`."""
        saved = Saved(self, len(self._saved), tensor)
        self._saved.append(saved)
        return saved

    def close(self, leaving: frozenset[int]) -> None:
        """Send off what leaves, now that all is saved that will be; hooks around the block get the rest."""
        saved, self._saved = self._saved, []
        for number, item in enumerate(reversed(saved)):
            if number in leaving:
                self._send(item)
        for item in saved:
            if not isinstance(item.held, Away):
                item.held = self.outer[0](item.held)
        if self._lane is not None:
            pairs = [(self._on_host(away), away.raw) for away in self._away if away.raw is not None]
            self._left = self._lane.copy(pairs)

    def _send(self, item: Saved) -> None:
        tensor: torch.Tensor = item.held
        lane = self._host.lane_of(tensor.device)
        if self._lane is not None and lane is not self._lane:
            return  # a block on two devices: the values of one of them leave
        storage = tensor.untyped_storage()
        piece = self._host.take(storage.nbytes(), pinned=tensor.is_cuda)
        if piece is None:
            return
        self._lane = lane
        self._home = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
        self._watched.append((tensor, item.writes))
        raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        raw.set_(storage, 0, (storage.nbytes(),), (1,))  # pyright: ignore[reportUnknownMemberType]
        form = tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
        item.held = Away(*form, storage.nbytes(), piece, raw)
        self._away.append(item.held)

    def settle(self) -> None:
        """Give up the device's memory of what has left; what this stream does later waits until it has."""
        if not self._watched:
            return
        self._let_home_wait()
        self._is_written = any(torch_tensors.version_of(tensor) != writes for tensor, writes in self._watched)
        self._watched = []
        for away in self._away:
            away.raw = None

    def note_given(self, number: int) -> None:
        """Note that backward reads a value: the first one, or one that it has read before, begins a backward."""
        if not self._given or number in self._given:
            self._given.clear()
            self._begin_backward()
        self._given.add(number)

    def _begin_backward(self) -> None:
        """Have this block's values on the device, and those of the block before, which is next, on their way.

        Raises:
            FxoptError: a value was written to while it left.
        """
        self.settle()
        if self._is_written:
            raise FxoptError(
                "backward: a value saved for it was written to after the forward pass, expected it unchanged\n"
                "write to a clone of the block's input or output"
            )
        self.start_coming()
        if self._came is not None and self._lane is not None:
            torch.cuda.current_stream(self._lane.device).wait_event(self._came)
            self._came = None
        before = None if self._before is None else self._before()
        if before is not None:
            before.settle()
            before.start_coming()

    def start_coming(self) -> None:
        """Start to copy back all values, unless they are on the device."""
        if self._lane is None or all(away.raw is not None for away in self._away):
            return
        self._leave_landing()
        self._landed, places = self._lane.landing.take([away.num_bytes for away in self._away])
        for away, place in zip(self._away, places, strict=True):
            away.raw = place
        self._came = self._lane.copy(
            [(place, self._on_host(away)) for away, place in zip(self._away, places, strict=True)]
        )

    def fetch(self, away: Away) -> torch.Tensor:
        """Return the value of `away` for backward; another backward copies it anew.

        Who reads the last one reads all of them before the next block's values are asked for: their memory is free.
        """
        raw, away.raw = away.raw, None
        assert raw is not None, "a value was not copied back before backward read it"
        if all(other.raw is None for other in self._away):
            self._leave_landing()
        value = torch.empty(0, dtype=away.dtype, device=raw.device)
        start = int(raw.storage_offset()) // value.element_size() + away.offset
        return value.set_(raw.untyped_storage(), start, away.size, away.stride)  # pyright: ignore

    def _leave_landing(self) -> None:
        if self._landed is not None and self._lane is not None:
            self._lane.landing.release(self._landed)
            self._landed = None

    def _on_host(self, away: Away) -> torch.Tensor:
        return self._host.bytes_of(away.piece, away.num_bytes)

    def _let_home_wait(self) -> None:
        """Let the stream that owns the memory of these values wait for the copies under way."""
        for event in (self._left, self._came):
            if event is not None:
                self._home.wait_event(event)
        self._left = self._came = None

    def __del__(self) -> None:
        """Give everything back; a graph may be dropped without a backward, with copies still under way."""
        self._let_home_wait()
        self._leave_landing()
        for away in self._away:
            self._host.release(away.piece)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
