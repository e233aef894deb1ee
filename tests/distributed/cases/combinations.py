"""One combination of an engine and what is trained: optimized before, optimized after, and stock, against one process.

Of two steps the first has batches of other sizes on each rank. The second reduces after two micro-batches, in the first
of which all labels of the last rank are ignored. Losses are means over the labels of all ranks and micro-batches.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from cases.libraries import prepare
from cases.models import (
    ON_GPU,
    build,
    gradients_of,
    largest_error,
    make_batch,
    make_model,
    num_items,
    report_of,
)
from cases.zero import initialize

import fxopt

ORDERS = ("before", "after")
Batch = dict[str, torch.Tensor]


def combination(
    engine: str,
    lora: bool = False,
    options: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Under DistributedDataParallel or FSDP2."""

    def make(which: str, model: Any) -> tuple[Any, Any]:
        model = build(engine, which, model, options or {})
        return model, _sgd(model)

    def unreduced(model: Any) -> AbstractContextManager[None]:
        return _unsynced(model) if engine == "fsdp2" else model.no_sync()

    return _compare(make, unreduced, make_model("llama", lora, **(overrides or {})))


def combination_of_accelerate(engine: str, lora: bool = False) -> dict[str, Any]:
    """Under what accelerate makes of a model: DistributedDataParallel, or what its FSDP2 plugin does."""
    accelerators: dict[int, Any] = {}

    def make(which: str, model: Any) -> tuple[Any, Any]:
        if which == "before":
            model = fxopt.optimize(model, verify="off")
        accelerator, model, optimizer = prepare(engine, model, _sgd(model))
        if which == "after":
            fxopt.optimize(model, verify="off")
        accelerators[id(model)] = accelerator
        return model, optimizer

    def unreduced(model: Any) -> AbstractContextManager[None]:
        return _unsynced(model) if engine == "fsdp2" else accelerators[id(model)].no_sync(model)

    return _compare(make, unreduced, make_model("llama", lora))


@contextlib.contextmanager
def _unsynced(model: Any) -> Iterator[None]:
    """As `no_sync` of FSDP2."""
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def combination_of_zero(
    stage: int, lora: bool = False, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Under a stage of DeepSpeed's ZeRO, which always reduces after two micro-batches."""
    from deepspeed.utils import safe_get_full_grad

    alone = make_model("llama", lora)
    rank, world = dist.get_rank(), dist.get_world_size()
    engines = {}
    for which in (*ORDERS, "stock"):
        model = copy.deepcopy(alone)
        if which == "before":
            model = fxopt.optimize(model, verify="off")
        engines[which] = initialize(model, stage, micro_batches=2, clipping=0.0, **(settings or {}))
        if which == "after":
            fxopt.optimize(engines[which].module, verify="off")
    errors: dict[str, list[float]] = {}
    optimizer = _sgd(alone)
    for step in (_uneven(0) + _uneven(1), _with_ignored(2)):
        total = num_items([batch for batches in step for batch in batches])
        found: dict[str, dict[str, torch.Tensor]] = {}
        for which, engine in engines.items():
            for micro, batches in enumerate(step):
                loss = engine(**batches[rank], num_items_in_batch=total).loss
                engine.backward(2 * world * loss)  # it takes the mean over micro-batches and ranks
                if micro == 1:
                    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
                    found[which] = {name: safe_get_full_grad(p).to("cpu", copy=True) for name, p in named}
                engine.step()
        found["alone"] = _train_alone(alone, optimizer, step, total)
        _note_errors(errors, found)
    return {which: {"errors": errors[which], **report_of(engines[which].module)} for which in ORDERS}


def _compare(
    make: Callable[[str, Any], tuple[Any, Any]],
    unreduced: Callable[[Any], AbstractContextManager[None]],
    alone: Any,
) -> dict[str, Any]:
    """Return of each order the errors of its gradients, and what its report says."""
    rank, world = dist.get_rank(), dist.get_world_size()
    trained = {which: make(which, copy.deepcopy(alone)) for which in (*ORDERS, "stock")}
    optimizer = _sgd(alone)
    errors: dict[str, list[float]] = {}
    for step in (_uneven(0), _with_ignored(1)):
        total = num_items([batch for batches in step for batch in batches])
        found: dict[str, dict[str, torch.Tensor]] = {}
        for which, (model, own) in trained.items():
            for batches in step:
                with contextlib.nullcontext() if batches is step[-1] else unreduced(model):
                    (model(**batches[rank], num_items_in_batch=total).loss * world).backward()
                if ON_GPU and which == "stock":
                    # Torch 2.11's FSDP2 reduces gradients of LoRA before they are there, under accelerate over NCCL.
                    torch.cuda.synchronize()
            found[which] = gradients_of(model)
            own.step()
            own.zero_grad()
        found["alone"] = _train_alone(alone, optimizer, step, total)
        _note_errors(errors, found)
    return {which: {"errors": errors[which], **report_of(trained[which][0])} for which in ORDERS}


def _sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def _uneven(seed: int) -> list[list[Batch]]:
    """Return one micro-batch, of other sizes on each rank."""
    return [[_batch(10 * seed + rank, rank) for rank in range(dist.get_world_size())]]


def _with_ignored(seed: int) -> list[list[Batch]]:
    """Return two micro-batches; in the first of them the last rank has ignored labels alone."""
    world = dist.get_world_size()
    return [
        [_batch(100 * seed + 10 * n + rank, rank, n == 0 and rank == world - 1) for rank in range(world)]
        for n in range(2)
    ]


def _batch(seed: int, rank: int, ignored: bool = False) -> Batch:
    return make_batch(seed, 1 + rank, 12 + 4 * rank, ignored)


def _train_alone(
    model: Any, optimizer: torch.optim.Optimizer, step: list[list[Batch]], total: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the gradients of one process that has all batches of a step, and make it."""
    for batch in (batch for batches in step for batch in batches):
        model(**batch, num_items_in_batch=total).loss.backward()
    found = {name: gradient.clone() for name, gradient in gradients_of(model).items()}
    optimizer.step()
    optimizer.zero_grad()
    return found


def _note_errors(errors: dict[str, list[float]], found: dict[str, dict[str, torch.Tensor]]) -> None:
    """Keep the largest errors of each order: against stock, against one process, and stock's against that."""
    stock = largest_error(found["stock"], found["alone"])
    for which in ORDERS:
        ours = [largest_error(found[which], found[name]) for name in ("stock", "alone")]
        errors[which] = [max(pair) for pair in zip(errors.get(which, [0.0] * 3), (*ours, stock), strict=True)]
