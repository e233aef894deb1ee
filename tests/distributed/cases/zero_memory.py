"""Memory under DeepSpeed's ZeRO: what a plan says, and what a step allocates on a CPU."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases.models import DEVICE, make_model
from cases.zero import initialize

import fxopt
from fxopt.planning import workspace_bytes

SIZES = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4, head_dim=64, vocab_size=512)
LENGTH = 256


def zero_memory(
    budget: Any,
    settings: dict[str, Any],
    half: bool = False,
    lora: bool = False,
    measured: bool = True,
    stage: int = 3,
    length: int = LENGTH,
    micro_batches: int = 1,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train five steps under a plan; return it, what then lives, and the most that the last two steps allocated.

    These are of the micro-batches and of the optimizer's steps, which begin with the gradients that are left.

    The optimizer is AdamW; the blocks are stock's, whose ops hold on a CPU what they hold on a GPU.
    """
    others = _find_storages()
    model = make_model("llama", lora, max_position_embeddings=LENGTH, **{**SIZES, **(overrides or {})})
    model = model.to(torch.bfloat16) if half else model
    fxopt.optimize(model, memory_budget=budget, lowering="plain", patterns=())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    engine = initialize(model, stage, optimizer=optimizer, micro_batches=micro_batches, **settings)
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(3, SIZES["vocab_size"], (1, length), generator=generator).to(engine.device)
    peaks: list[Any] = []
    updates: list[Any] = []
    for number in range(5 if measured else 2):
        with contextlib.ExitStack() as stack:
            if measured and number > 2:
                stack.enter_context(_collectives_unseen())
                stack.enter_context(_most_allocated(peaks))
            for micro_batch in range(micro_batches):
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                if micro_batch < micro_batches - 1:
                    engine.step()
        with contextlib.ExitStack() as stack:
            if measured and number > 2:
                stack.enter_context(_collectives_unseen())
                stack.enter_context(_most_allocated(updates))
            engine.step()
    (made,) = fxopt.explain(model).plans
    return {
        "static_bytes": made.static_bytes,
        "workspaces": workspace_bytes(DEVICE),
        "peak_bytes": made.peak_bytes,
        "timeline": {instant.name: instant.bytes for instant in made.timeline},
        "living_bytes": sum(s.nbytes() for place, s in _find_storages().items() if place not in others),
        "peaks": [peak.bytes for peak in peaks],
        "updates": [peak.left + update.bytes for peak, update in zip(peaks, updates, strict=True)],
    }


def _find_storages() -> dict[int, torch.UntypedStorage]:
    """Return the storages of all tensors on this rank's device that Python knows."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    storages = [each.untyped_storage() for each in tensors if each.device == DEVICE]
    found: dict[int, torch.UntypedStorage] = {}
    for storage in storages:
        with contextlib.suppress(RuntimeError):  # stand-ins that a capture left lie nowhere
            found[storage.data_ptr()] = storage
    return found


@contextlib.contextmanager
def _most_allocated(peaks: list[Any]) -> Iterator[None]:
    """Append to `peaks` the most that is allocated within the scope, and what is left of it."""
    sys.path.insert(0, str(Path(fxopt.__file__).parents[1]))
    try:
        from benchmarks.meters import CpuMeter
    finally:
        sys.path.pop(0)
    nothing = torch.nn.Module(), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with CpuMeter(*nothing).peak() as peak:
        yield
    peaks.append(peak)


@contextlib.contextmanager
def _collectives_unseen() -> Iterator[None]:
    """Let DeepSpeed gather and reduce by way of memory that the profiler does not see.

    Gloo makes copies for itself, as large as all that comes, where NCCL needs none, and a thread of its own frees them.
    """
    from deepspeed import comm
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero import partition_parameters

    class Done:
        def wait(self) -> None:
            """Wait for nothing."""

    def gather(given: torch.Tensor, received: torch.Tensor, group: Any = None) -> Done:
        for rank, part in enumerate(received.chunk(dist.get_world_size())):
            staged = _copy_unseen(given if rank == dist.get_rank() else part)
            dist.broadcast(staged, rank)
            part.copy_(staged)
        return Done()

    def collect(received: torch.Tensor, given: torch.Tensor, *_: Any, **__: Any) -> Done:
        return gather(given, received)

    def add(given: torch.Tensor, op: Any = None, **_: Any) -> None:
        staged = _copy_unseen(given)
        dist.all_reduce(staged, dist.ReduceOp.SUM if op is None else getattr(dist.ReduceOp, op.name))
        given.copy_(staged)

    def reduce(given: torch.Tensor, received: torch.Tensor, *_: Any, **__: Any) -> None:
        staged = _copy_unseen(given)
        dist.all_reduce(staged)
        given.copy_(staged)  # `received` is a part of it

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (partition_parameters, "_dist_allgather_fn", gather),
        (coalesced_collectives, "_torch_reduce_scatter_fn", reduce),
        (comm, "all_reduce", add),
        (comm, "all_gather_into_tensor", collect),
    ]
    stock = [getattr(holder, name) for holder, name, _ in replaced]
    for holder, name, function in replaced:
        setattr(holder, name, function)
    try:
        yield
    finally:
        for (holder, name, _), function in zip(replaced, stock, strict=True):
            setattr(holder, name, function)


def _copy_unseen(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of `tensor` in memory of NumPy's, which has no bfloat16."""
    items = tensor.reshape(-1).view(torch.uint8).numpy().copy()
    return torch.from_numpy(items).view(tensor.dtype).view(tensor.shape)
