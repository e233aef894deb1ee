"""The most that is allocated within a scope: by the counters of torch's allocator, or on a CPU by its profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Peak:
    """The most that was allocated within a scope, and what was left at its end, in bytes."""

    bytes = 0
    left = 0


class GpuMeter:
    """Reads the counters of torch's allocator."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def synchronize(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize()

    @contextlib.contextmanager
    def peak(self) -> Iterator[Peak]:
        """Measure what is allocated within the scope."""
        found = Peak()
        torch.cuda.reset_peak_memory_stats()
        yield found
        torch.cuda.synchronize()
        found.bytes, found.left = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()

    def more(self) -> dict[str, int]:
        """Return what else the counters say."""
        return {"reserved_bytes": torch.cuda.max_memory_reserved(), "before_bytes": self.before}


class CpuMeter:
    """Adds up the allocations that torch's profiler sees to what lives all the time."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def synchronize(self) -> None:
        """Wait for nothing: a CPU is done when it returns."""

    def _held(self) -> int:
        from fxopt.planning import held_bytes

        states = [v for state in self.optimizer.state.values() for v in state.values()]
        gradients = [p.grad for p in self.model.parameters()]
        return held_bytes(self.model) + sum(
            v.untyped_storage().nbytes() for v in (*states, *gradients) if isinstance(v, torch.Tensor)
        )

    @contextlib.contextmanager
    def peak(self) -> Iterator[Peak]:
        """Measure what is allocated within the scope; gradients that live at its start are counted."""
        found = Peak()
        left = getattr(self, "left", self._held())
        profiler: Any = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )
        with profiler:
            yield found
        total = most = 0
        for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                total += event.nbytes()
                most = max(most, total)
        found.bytes, found.left = left + most, left + total
        self.left = found.left

    def more(self) -> dict[str, int]:
        """Return nothing: there is nothing else."""
        return {}
