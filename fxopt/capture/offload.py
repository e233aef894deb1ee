"""Carries out what a plan offloads: saved values leave for the host after a block, and are back before its backward.

Torch has ops for it within one graph (`ao::offload`, `ao::reload`), but a block is a graph of its own: what its
backward reads has to be on its way while the backward of the block after it runs. So it is done where autograd saves
tensors, by hooks around the compiled block, the same for all lowerings:

- after a block has run, its values are copied on a stream beside the compute stream while the next block runs, and
  their memory on the device is given up when that one is done;
- when a block's backward begins, the values of the block before it start to come back, to the same place at each step;
- what is on the host stays there until autograd drops it, so that backward may run twice, or never.

On a CPU copies are done at once, along the same path.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from fxopt.capture import torch_tensors
from fxopt.capture.host_memory import HostMemory
from fxopt.capture.planning import Leaving, Planner
from fxopt.capture.saved_batch import Batch, Saved


class Offloader:
    """What one model's blocks have on the host; `find_bounds` says how much its plans need and may have."""

    def __init__(self, find_bounds: Callable[[], tuple[int, int]], tell: Callable[[str], None]) -> None:
        self._find_bounds = find_bounds
        self.memory = HostMemory(find_bounds, tell)
        self._last: Callable[[], Batch | None] = _none

    def begin(self) -> None:
        """Note that a call of the model begins: what an earlier one has on the host is none of its blocks' concern."""
        self._last = _none

    def wrap(self, compiled: Callable[..., Any], leaving: Leaving) -> Callable[..., Any]:
        """Return a compiled block so that the values numbered by `leaving` leave after each call of it."""
        find_self = weakref.ref(self)

        def run(*args: Any) -> Any:
            this = find_self()
            if this is None or not torch_tensors.can_hook_saved_tensors():
                return compiled(*args)
            return this.call(compiled, leaving.numbers, args)

        return run

    def call(self, compiled: Callable[..., Any], leaving: frozenset[int], args: tuple[Any, ...]) -> Any:
        """Call a compiled block, and send off what leaves."""
        before = self._last()
        if not leaving and (before is None or not before.has_left):
            self._last = _none
            return compiled(*args)
        batch = Batch(self.memory, before)
        with torch.autograd.graph.saved_tensors_hooks(batch.pack, Saved.give):
            outputs = compiled(*args)
        if before is not None:
            before.settle()
        batch.close(leaving)
        self._last = weakref.ref(batch)
        return outputs


def make_offloader(planner: Planner, tell: Callable[[str], None]) -> Offloader:
    """Return what carries out what `planner` wants on the host."""
    return Offloader(lambda: (planner.host_bytes, planner.host_limit), tell)


def _none() -> None:
    return None
