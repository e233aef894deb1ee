"""Ranks that differ, or are gone."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from typing import Any

import torch
import torch.distributed as dist
from cases.models import (
    DEVICE,
    ON_GPU,
    find_blocks,
    gradients_of,
    inside,
    largest_error,
    make_batch,
    make_model,
    report_of,
    wrap,
)

import fxopt
from fxopt.capture.installation import find_installation


def differ(
    engine: str,
    number_of_rank: dict[str, Any],
    options: dict[str, Any] | None = None,
    moved: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Each rank optimizes with its own options, and may move its model; return what the first step raises."""
    rank = str(dist.get_rank())
    model = fxopt.optimize(make_model("llama"), **number_of_rank.get(rank, {}))
    model.to((moved or {}).get(rank, DEVICE))
    model = wrap(engine, model, **(options or {}))
    try:
        model(**make_batch(0, 2, 12)).loss.backward()
    except fxopt.FxoptError as error:
        return {"raised": type(error).__name__, "text": str(error)}
    return {"raised": None}


def ungrouped(engine: str) -> dict[str, Any]:
    """The process group is gone: return what the engine raises for an optimized model, and how that trains alone."""
    dist.destroy_process_group()
    os.environ.pop("RANK")  # fully_shard would initialize a group of its own from it
    found: dict[str, dict[str, torch.Tensor]] = {}
    raised = ""
    for which in ("before", "stock"):
        model = make_model("llama")
        if which == "before":
            model = fxopt.optimize(model)
            try:
                wrap(engine, model)
            except (ValueError, RuntimeError) as error:
                raised = str(error)
        model(**make_batch(0, 2, 12)).loss.backward()
        found[which] = gradients_of(model)
        if which == "before":
            report = report_of(model)
    return {"raised": raised, "errors": {"stock": largest_error(found["before"], found["stock"])}, **report}


def one_stock() -> dict[str, Any]:
    """All ranks but the last are optimized; they are told so, and leave the group.

    The last one stays in it: gloo's group, taken down after a collective that lost a rank, waits now and then for ever.
    """
    model = make_model("llama")
    if dist.get_rank() < dist.get_world_size() - 1:
        model = fxopt.optimize(model)
    model = wrap("ddp", model)
    try:
        model(**make_batch(0, 2, 12)).loss.backward()
    except fxopt.FxoptError as error:
        if not ON_GPU:  # NCCL ends the process of a rank that waits for another one
            dist.destroy_process_group()
        return {"raised": type(error).__name__, "text": str(error)}
    except RuntimeError as error:
        return {"raised": type(error).__name__, "text": str(error)}
    return {"raised": None}


def killed(engine: str) -> dict[str, Any]:
    """The last rank dies in the forward of its second step, under a plan that leaves values on the host.

    Return what the others meet, and what is left of fxopt's then: its lock, memory on the host, threads, the model.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    model = fxopt.optimize(
        make_model("llama", lora=True, num_hidden_layers=6),
        memory_budget="min",
        max_host_memory="64MiB",
        verify="off",
    )
    is_zero = engine.startswith("zero")
    if is_zero:
        from cases.zero import initialize

        around: Any = initialize(model, 3, reduce_bucket_size=3000 if "several" in engine else 500_000_000)
    else:
        model = around = wrap(engine, model)

    backward = around.backward if is_zero else torch.Tensor.backward
    backward(around(**make_batch(0, 4, 48)).loss)
    installation = find_installation(model)
    assert installation is not None
    assert installation.offloader is not None
    memory = installation.offloader.memory
    planned = sum(plan.host_bytes for plan in fxopt.explain(inside(model)).plans)
    threads = set(threading.enumerate())
    if rank == world - 1:
        find_blocks(inside(model))[2].register_forward_pre_hook(lambda module, given: os._exit(1))
    try:
        loss = around(**make_batch(1, 4, 48)).loss
        backward(loss)
        loss.item()  # over NCCL collectives are waited for here
    except RuntimeError as error:
        raised = {"raised": type(error).__name__, "running": installation.model_call._lock.locked()}
        kept = weakref.ref(inside(model))
    else:
        return {"raised": None}
    del model, around, backward, installation
    loss = None
    gc.collect()
    held = memory.used_bytes
    del memory  # it finds its bounds through the model's planner
    gc.collect()
    # Threads that torch began are dummies to Python.
    begun = [each for each in threading.enumerate() if not isinstance(each, threading._DummyThread)]
    more = [thread.name for thread in begun if thread not in threads]
    return {
        **raised,
        "kept": kept() is not None,
        "planned_bytes": planned,
        "host_bytes": held,
        "threads": more,
    }
