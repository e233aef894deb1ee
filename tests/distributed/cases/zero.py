"""DeepSpeed's ZeRO: stages 1 and 2 keep parameters whole, stage 3 gathers each module's by hooks on it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from cases.models import gradients_of, largest_error, make_batch, make_model, num_items, report_of

import fxopt


def zero(stage: int, order: str, lora: bool = False) -> dict[str, Any]:
    """Two steps of SGD under a stage of ZeRO against stock; the gradients of the first against one process too."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    rank, world = dist.get_rank(), dist.get_world_size()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    alone = make_model("llama", lora)
    engines: dict[str, Any] = {}
    for which in (order, "stock"):
        model = copy.deepcopy(alone)
        if which == "before":
            model = fxopt.optimize(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        engines[which], *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        if which == "after":
            fxopt.optimize(engines[which].module)
    errors = {"stock": 0.0}
    for number in range(2):
        batches = [make_batch(10 * number + r, 1 + r, 12 + 4 * r) for r in range(world)]
        total = num_items(batches)
        found: dict[str, dict[str, torch.Tensor]] = {}
        for which, engine in engines.items():
            engine.backward(engine(**batches[rank], num_items_in_batch=total).loss * world)
            named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
            found[which] = {name: safe_get_full_grad(p).to("cpu", copy=True) for name, p in named}
            engine.step()
        errors["stock"] = max(errors["stock"], largest_error(found[order], found["stock"]))
        if number == 0:
            for batch in batches:
                alone(**batch, num_items_in_batch=total).loss.backward()
            errors["alone"] = largest_error(found[order], gradients_of(alone))
    return {"errors": errors, **report_of(engines[order].module)}
