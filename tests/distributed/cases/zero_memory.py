"""Memory under DeepSpeed's ZeRO-3: what a plan says, and what a step allocates on a CPU."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases.models import DEVICE, make_model
from cases.zero import initialize

import fxopt

SIZES = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4, head_dim=64, vocab_size=512)
LENGTH = 256


def zero_memory(
    budget: Any, settings: dict[str, int], half: bool = False, lora: bool = False, measured: bool = True
) -> dict[str, Any]:
    """Train five steps under a plan; return it, what then lives, and the most that the last two steps allocated.

    The optimizer is AdamW; the blocks are stock's, whose ops hold on a CPU what they hold on a GPU.
    """
    others = _find_storages()
    model = make_model("llama", lora, max_position_embeddings=LENGTH, **SIZES)
    model = model.to(torch.bfloat16) if half else model
    fxopt.optimize(model, memory_budget=budget, lowering="plain", patterns=())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    engine = initialize(model, 3, optimizer=optimizer, **settings)
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(3, SIZES["vocab_size"], (1, LENGTH), generator=generator).to(engine.device)
    peaks: list[int] = []
    for number in range(5 if measured else 2):
        with contextlib.ExitStack() as stack:
            if measured and number > 2:
                stack.enter_context(_collectives_unseen())
                stack.enter_context(_most_allocated(peaks))
            engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    (made,) = fxopt.explain(model).plans
    return {
        "static_bytes": made.static_bytes,
        "peak_bytes": made.peak_bytes,
        "timeline": {instant.name: instant.bytes for instant in made.timeline},
        "living_bytes": sum(s.nbytes() for place, s in _find_storages().items() if place not in others),
        "peaks": peaks,
    }


def _find_storages() -> dict[int, torch.UntypedStorage]:
    """Return the storages of all tensors on this rank's device that Python knows."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    storages = [each.untyped_storage() for each in tensors if each.device == DEVICE]
    return {storage.data_ptr(): storage for storage in storages}


@contextlib.contextmanager
def _most_allocated(peaks: list[int]) -> Iterator[None]:
    """Append to `peaks` the most that is allocated within the scope."""
    sys.path.insert(0, str(Path(fxopt.__file__).parents[1]))
    try:
        from benchmarks.meters import CpuMeter
    finally:
        sys.path.pop(0)
    nothing = torch.nn.Module(), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with CpuMeter(*nothing).peak() as peak:
        yield
    peaks.append(peak.bytes)


@contextlib.contextmanager
def _collectives_unseen() -> Iterator[None]:
    """Let DeepSpeed gather and reduce by way of memory that the profiler does not see.

    Gloo makes copies for itself, as large as all that comes, where NCCL needs none, and a thread of its own frees them.
    """
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero import partition_parameters

    class Done:
        def wait(self) -> None:
            """Wait for nothing."""

    def gather(given: torch.Tensor, received: torch.Tensor, group: Any = None) -> Done:
        for rank, part in enumerate(received.chunk(dist.get_world_size())):
            staged = torch.from_numpy((given if rank == dist.get_rank() else part).numpy().copy())
            dist.broadcast(staged, rank)
            part.copy_(staged)
        return Done()

    def reduce(given: torch.Tensor, received: torch.Tensor, *_: Any, **__: Any) -> None:
        staged = torch.from_numpy(given.numpy().copy())
        dist.all_reduce(staged)
        given.copy_(staged)  # `received` is a part of it

    stock = partition_parameters._dist_allgather_fn, coalesced_collectives._torch_reduce_scatter_fn
    partition_parameters._dist_allgather_fn, coalesced_collectives._torch_reduce_scatter_fn = gather, reduce
    try:
        yield
    finally:
        partition_parameters._dist_allgather_fn, coalesced_collectives._torch_reduce_scatter_fn = stock
