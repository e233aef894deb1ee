"""Steps under an engine: optimized against stock under the same engine, and both against one process with all data."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from cases.models import (
    build,
    find_blocks,
    gradients_of,
    inside,
    largest_error,
    make_batch,
    make_model,
    num_items,
    report_of,
    wrap,
)

import fxopt
from fxopt.capture.lazy import LazyLogits


def step(
    engine: str,
    order: str,
    arch: str = "llama",
    lora: bool = False,
    options: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Two steps of SGD, with uneven batches: optimized against stock under `engine`, and against one process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    options, overrides = options or {}, overrides or {}
    alone = make_model(arch, lora, **overrides)
    models = {which: build(engine, which, copy.deepcopy(alone), options, "on") for which in (order, "stock")}
    optimizers = {
        which: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for which, model in {**models, "alone": alone}.items()
    }
    errors: dict[str, float] = {"stock": 0.0, "alone": 0.0, "stock_alone": 0.0}
    for number in range(2):
        batches = [make_batch(10 * number + r, 1 + r, 12 + 4 * r) for r in range(world)]
        total = num_items(batches)
        found: dict[str, dict[str, torch.Tensor]] = {}
        for which, model in models.items():
            loss = model(**batches[rank], num_items_in_batch=total).loss * world
            loss.backward()
            found[which] = gradients_of(model)
        for batch in batches:
            alone(**batch, num_items_in_batch=total).loss.backward()
        found["alone"] = gradients_of(alone)
        errors["stock"] = max(errors["stock"], largest_error(found[order], found["stock"]))
        errors["alone"] = max(errors["alone"], largest_error(found[order], found["alone"]))
        errors["stock_alone"] = max(errors["stock_alone"], largest_error(found["stock"], found["alone"]))
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    return {"errors": errors, **report_of(models[order])}


def accumulate(engine: str, order: str, arch: str = "llama") -> dict[str, Any]:
    """Two micro-batches without a reduction and one with: gradients equal those of one process that has all."""
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = make_model(arch)
    batches = [[make_batch(10 * n + r, 2, 12 + 3 * r) for r in range(world)] for n in range(3)]
    total = num_items([batch for step in batches for batch in step])
    found: dict[str, dict[str, torch.Tensor]] = {}
    models = {which: build(engine, which, copy.deepcopy(alone), {}) for which in (order, "stock")}
    for which, model in models.items():
        for number, step in enumerate(batches):
            last = number == len(batches) - 1
            if engine == "fsdp2":
                model.set_requires_gradient_sync(last)
            scope = contextlib.nullcontext() if engine == "fsdp2" or last else model.no_sync()
            with scope:
                (model(**step[rank], num_items_in_batch=total).loss * world).backward()
        found[which] = gradients_of(model)
    for batch in (batch for step in batches for batch in step):
        alone(**batch, num_items_in_batch=total).loss.backward()
    expected = gradients_of(alone)
    errors = {
        "stock": largest_error(found[order], found["stock"]),
        "alone": largest_error(found[order], expected),
    }
    return {"errors": errors, **report_of(models[order])}


def ignored(engine: str, counted: bool) -> dict[str, Any]:
    """The last rank has only ignored labels, which count nothing (`counted`) or make its mean loss NaN as in stock."""
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = make_model("llama")
    batches = [make_batch(r, 2, 12, ignored=r == world - 1) for r in range(world)]
    more = {"num_items_in_batch": num_items(batches)} if counted else {}
    models = {which: build(engine, which, copy.deepcopy(alone), {}) for which in ("before", "stock")}
    found: dict[str, dict[str, torch.Tensor]] = {}
    losses: dict[str, float] = {}
    for which, model in models.items():
        loss = model(**batches[rank], **more).loss * world
        loss.backward()
        found[which], losses[which] = gradients_of(model), float(loss.detach())
    nan = {name for name, gradient in found["stock"].items() if gradient.isnan().any()}
    ours = {name for name, gradient in found["before"].items() if gradient.isnan().any()}
    error = largest_error(found["before"], found["stock"]) if not nan else None
    return {"distance": error, "losses": losses, "nan": [len(nan), len(ours)], **report_of(models["before"])}


def logits(engine: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read the logits of an optimized model after its forward, and train a loss of one's own on them."""
    rank = dist.get_rank()
    options = options or {}
    alone = make_model("llama")
    batch = make_batch(rank, 2, 12)
    found: dict[str, dict[str, torch.Tensor]] = {}
    values: dict[str, torch.Tensor] = {}
    for which in ("before", "stock"):
        model = build(engine, which, copy.deepcopy(alone), options)
        output = model(**batch)
        if which == "before":
            was_lazy = isinstance(output.logits, LazyLogits) and output.logits.is_lazy
        output.logits.float().pow(2).mean().backward()
        values[which] = output.logits.detach()
        found[which] = gradients_of(model)
        model.eval()
        with torch.no_grad():
            evaluated = model(**batch)
        assert type(evaluated.logits) is torch.Tensor
    errors = {"stock": largest_error(found["before"], found["stock"])}
    return {
        "errors": errors,
        "lazy": was_lazy,
        "same": torch.allclose(values["before"], values["stock"], atol=1e-6),
    }


def one_falls_back(engine: str, place: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """From the second of three steps on the last rank runs a part of the model stock.

    A user's hook sits at a `place` of it: on a block, inside one, or on the head; or Dynamo is switched off (`off`).
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = make_model("llama")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for which in ("before", "stock"):
        model = copy.deepcopy(alone)
        if which == "before":
            model = fxopt.optimize(model, verify="off")
        model = wrap(engine, model, **(options or {}))
        for number in range(3):
            if number == 1 and which == "before" and rank == world - 1:
                _hinder(inside(model), place)
            model.zero_grad()
            model(**make_batch(10 * number + rank, 2, 12)).loss.backward()
        torch._dynamo.config.disable = False
        found[which] = gradients_of(model)
        if which == "before":
            report = report_of(model)
    return {"errors": {"stock": largest_error(found["before"], found["stock"])}, **report}


def _hinder(model: Any, place: str) -> None:
    block = find_blocks(model)[0]
    places = {"block": block, "inside": block.mlp, "head": model.get_output_embeddings()}
    if place == "off":
        torch._dynamo.config.disable = True
    else:
        places[place].register_forward_hook(lambda module, given, output: None)
