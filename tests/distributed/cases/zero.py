"""DeepSpeed's ZeRO: stages 1 and 2 keep parameters whole, stage 3 gathers each module's by hooks on it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from cases.models import (
    find_blocks,
    gradients_of,
    largest_error,
    make_batch,
    make_model,
    num_items,
    report_of,
)

import fxopt
from fxopt.capture.lazy import LazyLogits


def zero(
    stage: int,
    order: str,
    lora: bool = False,
    overrides: dict[str, Any] | None = None,
    checkpointed: bool = False,
    leaves: bool = False,
    hooked: str = "",
    budget: str = "auto",
    lowering: str = "auto",
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Three steps of SGD under a stage of ZeRO against stock; the gradients of the first against one process too.

    DeepSpeed notes in the first two in which order parameters are gathered, and gathers ahead from the third on.
    `leaves`: it gathers each block as a whole. `hooked`: on the last rank a user's hook sits in a
    block, or on the head.
    `whole` names the parameters that are left gathered after a step.
    """
    from deepspeed.utils import safe_get_full_grad

    rank, world = dist.get_rank(), dist.get_world_size()
    alone = make_model("llama", lora, **(overrides or {}))
    engines: dict[str, Any] = {}
    for which in (order, "stock"):
        model = copy.deepcopy(alone)
        if checkpointed:
            model.gradient_checkpointing_enable()
        if which == "before":
            model = fxopt.optimize(model, memory_budget=budget, lowering=lowering)
        engines[which] = initialize(model, stage, leaves, **(settings or {}))
        if which == "after":
            fxopt.optimize(engines[which].module)
        if hooked and which == order and rank == world - 1:
            block, head = find_blocks(engines[which].module)[0], engines[which].module.get_output_embeddings()
            places = {"head": head, "block": block.mlp, "whole block": block}
            places[hooked].register_forward_hook(lambda *_: None)
    errors = {"stock": 0.0}
    lazy = True
    for number in range(3):
        batches = [make_batch(10 * number + r, 1 + r, 12 + 4 * r) for r in range(world)]
        total = num_items(batches)
        found: dict[str, dict[str, torch.Tensor]] = {}
        for which, engine in engines.items():
            output = engine(**batches[rank], num_items_in_batch=total)
            engine.backward(output.loss * world)
            named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
            found[which] = {name: safe_get_full_grad(p).to("cpu", copy=True) for name, p in named}
            engine.step()
            lazy = lazy and (
                which == "stock" or (isinstance(output.logits, LazyLogits) and output.logits.is_lazy)
            )
        errors["stock"] = max(errors["stock"], largest_error(found[order], found["stock"]))
        if number == 0:
            for batch in batches:
                alone(**batch, num_items_in_batch=total).loss.backward()
            errors["alone"] = largest_error(found[order], gradients_of(alone))
    whole = [name for name, parameter in engines[order].module.named_parameters() if parameter.numel()]
    return {"errors": errors, "lazy": lazy, "whole": whole, **report_of(engines[order].module)}


def zero_gathers(budget: str, checkpointed: bool = False) -> dict[str, Any]:
    """Return how often and how much ZeRO-3 gathers in a step, optimized and stock; nothing is gathered ahead."""
    from deepspeed.runtime.zero import partition_parameters

    stock = partition_parameters._dist_allgather_fn
    counts: dict[str, list[int]] = {}

    def gather(given: torch.Tensor, received: torch.Tensor, group: Any = None) -> Any:
        counts[which].append(received.numel())
        return stock(given, received, group)

    for which in ("before", "stock"):
        model = make_model("llama")
        if checkpointed:
            model.gradient_checkpointing_enable()
        if which == "before":
            model = fxopt.optimize(model, memory_budget=budget, lowering="inductor", verify="off")
        off = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
        engine = initialize(model, 3, **off)
        for number in range(3):
            counts[which] = []
            partition_parameters._dist_allgather_fn = gather
            try:
                engine.backward(engine(**make_batch(number, 2, 12)).loss)
            finally:
                partition_parameters._dist_allgather_fn = stock
            engine.step()
        if which == "before":
            report = report_of(model)
    block = sum(each.ds_numel for each in find_blocks(model)[0].parameters())
    whole = sum(each.ds_numel for each in model.parameters())
    gathered = {which: [len(found), sum(found)] for which, found in counts.items()}
    return {"gathered": gathered, "block": block, "whole": whole, **report}


def zero_differs(stage: int) -> dict[str, Any]:
    """The last rank optimizes with other options; return what the first step under a stage of ZeRO raises."""
    is_last = dist.get_rank() == dist.get_world_size() - 1
    model = fxopt.optimize(make_model("llama"), disable=["glu"] if is_last else [])
    engine = initialize(model, stage)
    try:
        engine(**make_batch(0, 2, 12))
    except fxopt.FxoptError as error:
        return {"raised": type(error).__name__, "text": str(error)}
    return {"raised": None}


def zero_logits() -> dict[str, Any]:
    """Read logits after a forward pass under ZeRO-3, and return what that raises."""
    engine = initialize(fxopt.optimize(make_model("llama")), 3)
    output = engine(**make_batch(0, 2, 12))
    try:
        output.logits.sum()
    except fxopt.FxoptError as error:
        return {"raised": type(error).__name__, "text": str(error)}
    return {"raised": None}


def initialize(
    model: Any,
    stage: int,
    leaves: bool = False,
    optimizer: Any = None,
    micro_batches: int = 1,
    checkpoint: dict[str, Any] | None = None,
    clipping: float = 1.0,
    **more: Any,
) -> Any:
    """Return DeepSpeed's engine around `model`, under a stage of ZeRO with `more` settings of its.

    It clips gradients at a norm of 1 by default.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    if leaves:
        set_z3_leaf_modules(model, [type(find_blocks(model)[0])])
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **more},
        "bf16": {"enabled": next(model.parameters()).dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": checkpoint or {},
        "gradient_clipping": clipping,
    }
    if optimizer is None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine
