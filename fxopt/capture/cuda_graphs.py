"""CUDA graphs: when the blocks of a model's call are recorded and replayed, and what leaves their memory.

Inductor's own trees of CUDA graphs do the recording. What a replay writes lies in memory that the next replay writes
again, so what outlives a step is copied out: gradients that torch accumulates, and blocks' results that the model
returns. A call is replayed only where nothing of an earlier one still waits for its backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fxopt.capture import torch_dynamo, torch_tensors
from fxopt.capture.modules import tensors_of
from fxopt.graph.torch_private import tree_map
from fxopt.kernels import launch

_waiting: set[StorageWeakRef] = set()
"""Of each replayed call, in all models: what lives as long as its backward pass can still run."""


class CudaGraphs:
    """The replays of one model's blocks; `note` tells once why a call is not replayed."""

    def __init__(self, obstacle: str | None, note: Callable[[str], None]) -> None:
        self._obstacle = obstacle
        self._note = note
        self._token: torch.Tensor | None = None
        self._written: set[int] = set()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Serve one call of the model within the scope; nested and concurrent calls are not replayed."""
        if self._token is not None:
            yield
            return
        reason = self._find_obstacle()
        if reason is not None:
            if reason:
                self.refuse(reason)
            yield
            return
        self._token = torch.empty(1)
        _waiting.add(StorageWeakRef(self._token.untyped_storage()))
        self._written.clear()
        try:
            yield
        finally:
            self._token = None

    @property
    def are_used(self) -> bool:
        """Whether a block called now is replayed: not while activations are checkpointed or kept elsewhere."""
        return self._token is not None and not torch_tensors.packs_saved_tensors()

    def _find_obstacle(self) -> str | None:
        if self._obstacle is not None:
            return self._obstacle
        _waiting.difference_update([token for token in _waiting if token.expired()])
        if _waiting:
            return "an earlier call of this or another model still waits for its backward pass"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return "a process group is initialized"
        return None

    def refuse(self, reason: str) -> None:
        """Note why a call is not replayed."""
        self._note(f"CUDA graphs are not used: {reason}")

    def with_replays(self, lower: Callable[..., Any], region: str) -> Callable[..., Any]:
        """Return `lower` so that what it compiles is replayed, and what outlives a step leaves its memory."""

        def lower_graph(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            before = torch_dynamo.num_unrecorded()
            compiled = lower(gm, example_inputs, graphed=True)
            if torch_dynamo.num_unrecorded() > before:
                self.refuse(f"Inductor does not record {region}; TORCH_LOGS=perf_hints says why")

            def run(*args: Any) -> Any:
                results = compiled(*self._enter(args))
                self._note_results(results)
                return results

            return run

        return lower_graph

    def _enter(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return `args` so that gradients of what no block of this call returned are copied out of the replays."""
        places = [
            place
            for place, value in enumerate(args)
            if isinstance(value, torch.Tensor)
            and value.requires_grad
            and value.untyped_storage().data_ptr() not in self._written
        ]
        if not places:
            return args
        entered: Any = Leave.apply(self._token, *(args[place] for place in places))
        changed = list(args)
        for place, value in zip(places, entered, strict=True):
            changed[place] = value
        return tuple(changed)

    def _note_results(self, results: Any) -> None:
        """Note what a block returned: it lies in the memory of the replays."""
        for value in results if isinstance(results, tuple | list) else (results,):
            if isinstance(value, torch.Tensor):
                self._written.add(value.untyped_storage().data_ptr())

    def copy_out(self, output: Any) -> Any:
        """Return a model's output with copies of what lies in the memory of the replays."""
        if not self._written:
            return output

        def copied(value: Any) -> Any:
            is_written = type(value) is torch.Tensor and value.untyped_storage().data_ptr() in self._written
            return value.clone() if is_written else value

        return tree_map(copied, output)


class Leave(torch.autograd.Function):
    """Inputs as they are; in the backward pass, copies of their gradients."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return views of `values`; `token` lives as long as what this call saved."""
        ctx.save_for_backward(token)
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return copies of `gradients`."""
        found = [gradient for gradient in gradients if gradient is not None]
        copies = iter(copies_of(found))
        return None, *(None if gradient is None else next(copies) for gradient in gradients)


def copies_of(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies of `tensors`, made in one launch per dtype.

    >>> copies_of([torch.tensor([1]), torch.tensor([0.5])])
    [tensor([1]), tensor([0.5000])]
    """
    copies = [torch.empty_like(tensor) for tensor in tensors]
    for dtype in {tensor.dtype for tensor in tensors}:
        pairs = [pair for pair in zip(copies, tensors, strict=True) if pair[0].dtype == dtype]
        torch_tensors.copy_each(*map(list, zip(*pairs, strict=True)))
    return copies


def find_obstacle(model: nn.Module) -> str | None:
    """Return why calls of `model` are never replayed, or None; "" where nobody would expect it."""
    if not launch.is_available():
        return ""
    devices = {tensor.device for tensor in tensors_of(model)}
    if not any(device.type == "cuda" for device in devices):
        return ""
    if len(devices) > 1:
        return f"the model lies on {', '.join(sorted(map(str, devices)))}"
    return None
