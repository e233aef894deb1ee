"""Plans under an engine: what they count, and that ranks agree on them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from cases.models import (
    DEVICE,
    find_blocks,
    gradients_of,
    inside,
    largest_error,
    make_batch,
    make_model,
    wrap,
)

import fxopt
import fxopt.planning
from fxopt.capture.installation import find_installation


def plan(
    engine: str,
    budget: Any,
    options: dict[str, Any] | None = None,
    less: float = 1.0,
    lora: bool = False,
    held: int = 0,
) -> dict[str, Any]:
    """Train a step under a plan and return it; the last rank's device has `less` of the memory of the others'.

    The first rank has a buffer more, of `held` bytes, that no computation reads.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make_model("llama", lora)
    whole = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    model.register_buffer("more", torch.zeros(held if rank == 0 else 0, dtype=torch.uint8, device=DEVICE))
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    block = sum(parameter.nbytes for parameter in find_blocks(model)[0].parameters())
    model = wrap(engine, fxopt.optimize(model, memory_budget=budget, verify="off"), **(options or {}))
    with _smaller_device(less if rank == world - 1 else 1.0):
        model(**make_batch(0, 2, 24)).loss.backward()
    (made,) = fxopt.explain(inside(model)).plans
    return {
        "plan": dataclasses.asdict(made),
        "residual_bytes": made.residual_bytes,
        "weights": sum(whole.values()),
        "trained": trained,
        "buffers": buffers,
        "workspaces": fxopt.planning.workspace_bytes(DEVICE),
        "block": block,
    }


@contextlib.contextmanager
def _smaller_device(share: float) -> Iterator[None]:
    """Let plans made within the scope see a device with `share` of its memory, on which nothing but the model lies.

    A GPU also holds what earlier cases left and what cuBLAS works in, more than all of a tiny model.
    """
    stock, allocated = fxopt.planning.device_of, torch.cuda.memory_allocated

    def device_of(device: torch.device) -> Any:
        found = stock(device)
        return dataclasses.replace(found, memory_bytes=int(found.memory_bytes * share))

    fxopt.planning.device_of, torch.cuda.memory_allocated = device_of, lambda device=None: 0
    try:
        yield
    finally:
        fxopt.planning.device_of, torch.cuda.memory_allocated = stock, allocated


def shortage(engine: str) -> dict[str, Any]:
    """On every rank the last block runs out of memory once; return how often the first one was called, and the end."""
    model = fxopt.optimize(make_model("llama", num_hidden_layers=6), memory_budget=None, verify="off")
    installation = find_installation(model)
    assert installation is not None
    calls = installation._calls["model.layers"]
    run, seen = calls._run, []

    def failing(path: str, block: Any, recorders: Any, args: Any, kwargs: Any) -> Any:
        seen.append(path)
        if path == "model.layers.5" and seen.count(path) == 1:
            raise torch.OutOfMemoryError("no memory")
        return run(path, block, recorders, args, kwargs)

    calls._run = failing
    model = wrap(engine, model)
    try:
        model(**make_batch(0, 2, 12)).loss.backward()
    except torch.OutOfMemoryError as error:
        return {"passes": seen.count("model.layers.0"), "notes": " ".join(error.__notes__)}
    return {"passes": seen.count("model.layers.0"), "notes": ""}


def waiting(engine: str) -> dict[str, Any]:
    """Accumulate two steps with values on the host and without; return how their gradients differ, and what waits."""
    found: list[dict[str, torch.Tensor]] = []
    for host in (0, "64MiB"):
        model = make_model("llama", lora=True, num_hidden_layers=6)
        model = wrap(engine, fxopt.optimize(model, memory_budget="min", max_host_memory=host, verify="off"))
        for seed in range(2):
            model(**make_batch(seed, 8, 64)).loss.backward()
        found.append(gradients_of(model))
    installation = find_installation(inside(model))
    assert installation is not None
    (made,) = fxopt.explain(inside(model)).plans
    memory: Any = installation.offloader
    return {
        "difference": largest_error(found[1], found[0]),
        "fallbacks": len(installation.ledger.fallbacks),
        "host_bytes": made.host_bytes,
        "reserved_bytes": memory.memory.reserved_bytes,
        "used_bytes": memory.memory.used_bytes,
    }
