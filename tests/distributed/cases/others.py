"""What keeps weights where fxopt may not read them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from cases.models import (
    DEVICE,
    find_blocks,
    gradients_of,
    largest_error,
    make_batch,
    make_model,
    report_of,
    wrap,
)
from torch import nn

import fxopt


def gathered_by_hooks(place: str) -> dict[str, Any]:
    """As ZeRO-3: weights are empty but while their module runs, gathered and freed by hooks on it (`place`)."""
    alone = make_model("llama")
    batch = make_batch(dist.get_rank(), 2, 12)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for which in ("before", "stock"):
        model = copy.deepcopy(alone)
        held: list[nn.Module] = [model.get_output_embeddings()]
        if place == "all":
            held = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
        if which == "before":
            model = fxopt.optimize(model, verify="off")
        for module in held:
            _free_but_in_forward(module)
        loss = model(**batch).loss
        for module in held:
            module.weight.data = module.whole  # gathered again for backward
        loss.backward()
        found[which] = gradients_of(model)
        if which == "before":
            report = report_of(model)
    return {"errors": {"stock": largest_error(found["before"], found["stock"])}, **report}


def _free_but_in_forward(module: Any) -> None:
    module.whole = module.weight.data

    def gather(module: Any, given: Any) -> None:
        module.weight.data = module.whole

    def free(module: Any, given: Any, output: Any) -> None:
        module.weight.data = torch.empty(0, device=DEVICE)

    module.register_forward_pre_hook(gather)
    module.register_forward_hook(free)
    free(module, None, None)


def tensor_parallel() -> dict[str, Any]:
    """A model under a plan of transformers' own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    alone = make_model("llama")
    batch = make_batch(0, 2, 12)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for which in ("before", "stock"):
        model = copy.deepcopy(alone)
        if which == "before":
            model = fxopt.optimize(model, verify="off")
        for block in find_blocks(model):
            plan = {name: ColwiseParallel() for name in ("gate_proj", "up_proj")}
            parallelize_module(block.mlp, mesh, {**plan, "down_proj": RowwiseParallel()})
        model(**batch).loss.backward()
        found[which] = gradients_of(model)
        if which == "before":
            report = report_of(model)
    return {"errors": {"stock": largest_error(found["before"], found["stock"])}, **report}


def planned_by_transformers(folder: str, heads: int) -> dict[str, Any]:
    """A model that transformers loads under its own tensor parallel plan, which spreads `heads` over the ranks."""
    from transformers import AutoModelForCausalLM

    alone = make_model("llama", num_key_value_heads=heads)
    if dist.get_rank() == 0:
        alone.save_pretrained(folder)
    dist.barrier()
    batch = make_batch(0, 2, 12)
    found: dict[str, dict[str, torch.Tensor]] = {}
    losses: dict[str, float] = {}
    for which in ("before", "stock", "alone"):
        model = alone
        if which != "alone":
            model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).train()
        if which == "before":
            model = fxopt.optimize(model, verify="off")
        loss = model(**batch).loss
        loss.backward()
        found[which], losses[which] = gradients_of(model), float(loss.detach())
        if which == "before":
            report = report_of(model)
    return {"errors": {"stock": largest_error(found["before"], found["stock"])}, "losses": losses, **report}


def compiled_around() -> dict[str, Any]:
    """An optimized model whose engine the user compiles before the first step, as `torch_compile=True` of a Trainer."""
    alone = make_model("llama")
    batch = make_batch(dist.get_rank(), 2, 12)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for which in ("before", "stock"):
        model = copy.deepcopy(alone)
        if which == "before":
            model = fxopt.optimize(model, verify="off")
        engine = torch.compile(wrap("ddp", model), backend="eager")  # it reduces as long as somebody holds it
        engine(**batch).loss.backward()
        found[which] = gradients_of(model)
    return {"errors": {"stock": largest_error(found["before"], found["stock"])}}


def first_fsdp(original: bool, wraps_blocks: bool) -> dict[str, Any]:
    """`FullyShardedDataParallel` around a model that was optimized, and around one that was not."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    alone = make_model("llama")
    batch = make_batch(dist.get_rank(), 2, 12)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for which in ("before", "stock"):
        model = copy.deepcopy(alone)
        policy = ModuleWrapPolicy({type(find_blocks(model)[0])}) if wraps_blocks else None
        if which == "before":
            model = fxopt.optimize(model, verify="off")
        engine = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=original, device_id=DEVICE
        )
        trained = torch.optim.SGD(engine.parameters(), lr=0.1)
        engine(**batch).loss.backward()
        trained.step()
        with FullyShardedDataParallel.summon_full_params(engine):
            names = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in engine.named_parameters()}
            found[which] = {name: parameter.detach().clone() for name, parameter in names.items()}
        if which == "before":
            report = report_of(model)
    return {"errors": {"stock": largest_error(found["before"], found["stock"])}, **report}
