"""CUDA graphs: when the blocks of a model's call are recorded and replayed, and what leaves their memory.

Inductor's own trees of CUDA graphs do the recording. What a replay writes lies in memory that the next replay writes
again, so what outlives a step is copied out: gradients that torch accumulates, and blocks' results that the model
returns. A call is replayed only where nothing of an earlier one still waits for its backward pass.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fxopt.capture import torch_dynamo, torch_tensors
from fxopt.capture.modules import tensors_of
from fxopt.graph.torch_private import tree_leaves, tree_map
from fxopt.kernels import launch
from fxopt.options import MOST_COPIED

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
        """Serve one call of the model within the scope; a nested one is a part of it."""
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

    def serve(self, args: tuple[Any, ...], kwargs: dict[str, Any], num_blocks: int) -> bool:
        """Return whether a block called with these arguments is replayed, as so many like it are.

        The first tensor is what blocks hand on. Of the others each recorded graph keeps a copy.
        """
        if not self.are_used:
            return False
        tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        others = [tensor for tensor in list(tensors.values())[1:] if not tensor.requires_grad]
        # What is expanded is copied as it lies in memory.
        shared = sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in others)
        if shared * num_blocks <= MOST_COPIED:
            return True
        self.refuse(f"each of {num_blocks} blocks would keep a copy of what all are given, a wide mask say")
        return False

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
            torch_dynamo.expect_equal_blocks()
            before = torch_dynamo.num_unrecorded()
            compiled = lower(gm, example_inputs, graphed=True)
            if torch_dynamo.num_unrecorded() > before:
                self.refuse(f"Inductor does not record {region}; TORCH_LOGS=perf_hints says why")

            def run(*args: Any) -> Any:
                results = compiled(*self._enter(args))
                items = results if isinstance(results, tuple | list) else (results,)
                returned = [item for item in items if isinstance(item, torch.Tensor)]
                self._copy_gradients(args, returned)
                self._written.update(value.untyped_storage().data_ptr() for value in returned)
                return results

            return run

        return lower_graph

    def _enter(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return `args`, one that needs a gradient behind a node that holds on to this call."""
        for place, value in enumerate(args):
            if isinstance(value, torch.Tensor) and value.requires_grad and not self._is_written(value):
                held: Any = Hold.apply(self._token, value)
                return (*args[:place], held, *args[place + 1 :])
        return args

    def _copy_gradients(self, args: tuple[Any, ...], returned: list[torch.Tensor]) -> None:
        """Have a block's gradients copied out of the replays, but for those that a block of this call reads."""
        given = {value.grad_fn for value in args if isinstance(value, torch.Tensor)} - {None}
        values = (value for value in args if isinstance(value, torch.Tensor) and value.grad_fn in given)
        read = {value.grad_fn for value in values if self._is_written(value)}
        for node in dict.fromkeys(_compiled_node_behind(value.grad_fn, given) for value in returned):
            if node is not None:
                node.register_hook(_copier(weakref.ref(node), read))

    def _is_written(self, value: torch.Tensor) -> bool:
        """Return whether `value` lies in the memory of the replays, as what a block returned."""
        return value.untyped_storage().data_ptr() in self._written

    def copy_out(self, output: Any) -> Any:
        """Return a model's output with copies of what lies in the memory of the replays."""
        if not self._written:
            return output

        def copied(value: Any) -> Any:
            return value.clone() if type(value) is torch.Tensor and self._is_written(value) else value

        return tree_map(copied, output)


class Hold(torch.autograd.Function):
    """An input as it is; `token` lives as long as what this call saved."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return a view of `value`."""
        ctx.save_for_backward(token)
        ctx.set_materialize_grads(False)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient as it is."""
        return None, *gradients


def _compiled_node_behind(end: Any, given: set[Any]) -> Any:
    """Return the node of the compiled graph that a result comes from, itself or by views; None if from no such."""
    while end is not None and end not in given and not torch_tensors.is_compiled_node(end):
        end = end.next_functions[0][0] if len(end.next_functions) == 1 else None
    return None if end in given else end


def _copier(find_node: Callable[[], Any], read: set[Any]) -> Callable[..., Any]:
    """Return a hook that gives copies of a node's gradients, but of those that the nodes `read` take up."""

    def copy(gradients: tuple[torch.Tensor | None, ...], _: Any) -> tuple[torch.Tensor | None, ...]:
        takers = (taker for taker, _ in find_node().next_functions)
        found = {
            place: gradient
            for place, (gradient, taker) in enumerate(zip(gradients, takers, strict=True))
            if gradient is not None and taker not in read
        }
        copies = dict(zip(found, copies_of(list(found.values())), strict=True))
        return tuple(copies.get(place, gradient) for place, gradient in enumerate(gradients))

    return copy


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
