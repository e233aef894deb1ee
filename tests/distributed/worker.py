"""One process of a group under test: reads the name of a case and its arguments, a line each, and answers with a line.

Run by `conftest.py`, which starts `WORLD_SIZE` of these; imports are paid once for all tests. What is compared is
compared here: optimized and stock under the same engine, and both against one process that has all the data.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import datetime
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

import fxopt
from fxopt.capture import torch_distributed as engines
from fxopt.capture.installation import find_installation
from fxopt.capture.lazy import LazyLogits

TINY = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=128,
    max_position_embeddings=64,
)
IGNORED = -100


def make_model(arch: str, lora: bool = False, **overrides: Any) -> Any:
    """Return a tiny model in training mode, the same weights on every rank; with `lora` on a frozen base."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(arch, **{**TINY, **overrides})
    model = AutoModelForCausalLM.from_config(config)
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model.train()


def make_batch(seed: int, rows: int, length: int, ignored: bool = False) -> dict[str, torch.Tensor]:
    """Return ids and labels; some labels are ignored, or all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, : length // 3] = IGNORED
    if ignored:
        labels[:] = IGNORED
    return {"input_ids": ids, "labels": labels}


def num_items(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Return the number of labels that count, over all `batches`."""
    return torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches]).sum()


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a causal LM, wrapped by adapters or not."""
    return next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1)


def shard(model: Any, carved: bool = False, half: bool = False, **options: Any) -> Any:
    """Shard `model` per block and as a whole; `carved` as accelerate does, embedding and tail in their own groups."""
    if half:
        dtype = torch.bfloat16
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype, output_dtype=dtype)
    blocks = find_blocks(model)
    for block in blocks:
        fully_shard(block, **options)
    if carved:
        inner, head = find_around(model, blocks), model.get_output_embeddings()
        norm = next(
            m for m in reversed(list(inner.children())) if next(m.parameters(recurse=False), None) is not None
        )
        table = model.get_input_embeddings()
        if table.weight is head.weight:
            fully_shard([table, norm, head], **options)
        else:
            fully_shard(table, **options)
            fully_shard([norm, head], **{"reshard_after_forward": False, **options})
    return fully_shard(model, **options)


def find_around(model: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    """Return the module that holds the list of `blocks`."""
    return next(m for m in model.modules() if any(blocks[0] in list(c.children()) for c in m.children()))


def wrap(engine: str, model: Any, **options: Any) -> Any:
    """Return `model` under `engine`."""
    if engine == "ddp":
        return DistributedDataParallel(model, **options)
    assert engine == "fsdp2", engine
    return shard(model, **options)


def inside(model: Any) -> Any:
    """Return the model that an engine wraps."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the whole gradients of the parameters that have one."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in inside(model).named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
    return found


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest relative error of a gradient; the same parameters must have one."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    norms = [float((found[n] - expected[n]).norm() / expected[n].norm().clamp_min(1e-12)) for n in expected]
    return max(norms)


def report_of(model: Any) -> dict[str, Any]:
    """Return what an optimized model did: fallbacks with reasons, sites by status and pattern."""
    installation = find_installation(model)
    assert installation is not None, "not optimized"
    report = fxopt.explain(inside(model))
    sites: dict[str, int] = {}
    for site in report.sites:
        key = site.pattern if site.status == "rewritten" else f"{site.status} {site.pattern}: {site.reason}"
        sites[key] = sites.get(key, 0) + site.count
    fallbacks = {f"{region}: {why}": n for (region, why), n in installation.ledger.fallbacks.items()}
    return {"fallbacks": fallbacks, "sites": sites, "notes": list(installation.ledger.notes)}


def build(engine: str, order: str, model: Any, options: dict[str, Any], verify: str = "off") -> Any:
    """Return `model` under `engine`, optimized before or after, or stock."""
    if order == "before":
        model = fxopt.optimize(model, verify=verify)
    model = wrap(engine, model, **options)
    if order == "after":
        wrapped = fxopt.optimize(model, verify=verify)
        assert wrapped is model
    return model


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


@contextlib.contextmanager
def collectives_counted() -> Iterator[collections.Counter[str]]:
    """Count the collectives that engines written in Python start within the scope."""
    counts: collections.Counter[str] = collections.Counter()
    names = ("all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor")
    names = tuple(name for name in names if hasattr(dist, name))  # before torch 2.13 the last two alone
    stock = {name: getattr(dist, name) for name in names}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts["gather" if "gather" in name else "reduce"] += 1
            return stock[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counted(name))
    try:
        yield counts
    finally:
        for name in names:
            setattr(dist, name, stock[name])


def collectives(
    engine: str, options: dict[str, Any] | None = None, checkpointed: bool = False, budget: str | None = None
) -> dict[str, Any]:
    """Count the collectives of the second step, optimized and stock; of DDP the buckets that are reduced."""
    rank = dist.get_rank()
    counts: dict[str, dict[str, int]] = {}
    computed: dict[str, bool] = {}
    planned = 0
    for which in ("before", "stock"):
        model = make_model("llama")
        if checkpointed:
            model.gradient_checkpointing_enable()
        if which == "before":
            model = fxopt.optimize(model, memory_budget=budget or "auto", verify="off")
        model = wrap(engine, model, **(options or {}))
        buckets: collections.Counter[str] = collections.Counter()
        if engine == "ddp":

            def reduce(state, bucket, buckets=buckets):  # torch reads annotations where there are any
                buckets["bucket"] += 1
                return allreduce_hook(state, bucket)

            model.register_comm_hook(None, reduce)
        for number in range(2):
            buckets.clear()
            with collectives_counted() as counted:
                output = model(**make_batch(number + rank, 2, 12))
                output.loss.backward()
        counts[which] = {**counted, **buckets}
        computed[which] = not (isinstance(output.logits, LazyLogits) and output.logits.is_lazy)
        if which == "before":
            report = report_of(model)
            planned = len(fxopt.explain(inside(model)).plans)
    return {"counts": counts, "computed": computed, "plans": planned, **report}


def differ(engine: str, number_of_rank: dict[str, Any]) -> dict[str, Any]:
    """Each rank optimizes with its own options; return what the first step raises."""
    model = fxopt.optimize(make_model("llama"), **number_of_rank.get(str(dist.get_rank()), {}))
    model = wrap(engine, model)
    try:
        model(**make_batch(0, 2, 12)).loss.backward()
    except fxopt.FxoptError as error:
        return {"raised": type(error).__name__, "text": str(error)}
    return {"raised": None}


def one_falls_back(engine: str) -> dict[str, Any]:
    """On the last rank a user's hook sits in a block, which runs stock there and compiled on the others."""
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = make_model("llama")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for which in ("before", "stock"):
        model = copy.deepcopy(alone)
        if which == "before":
            model = fxopt.optimize(model, verify="off")
            if rank == world - 1:
                find_blocks(model)[0].mlp.register_forward_hook(lambda module, given, output: None)
        model = wrap(engine, model)
        for number in range(2):
            model.zero_grad()
            model(**make_batch(10 * number + rank, 2, 12)).loss.backward()
        found[which] = gradients_of(model)
        if which == "before":
            report = report_of(model)
    return {"errors": {"stock": largest_error(found["before"], found["stock"])}, **report}


def one_stock() -> dict[str, Any]:
    """All ranks but the last are optimized; they are told so, and leave the group."""
    model = make_model("llama")
    if dist.get_rank() < dist.get_world_size() - 1:
        model = fxopt.optimize(model)
    model = wrap("ddp", model)
    try:
        model(**make_batch(0, 2, 12)).loss.backward()
    except (fxopt.FxoptError, RuntimeError) as error:
        return {"raised": type(error).__name__, "text": str(error)}
    finally:
        dist.destroy_process_group()
    return {"raised": None}


def killed(engine: str) -> dict[str, Any]:
    """The last rank dies in the forward of its second step; return what the others meet."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build(engine, "before", make_model("llama"), {})
    model(**make_batch(0, 2, 12)).loss.backward()
    if rank == world - 1:
        find_blocks(inside(model))[1].register_forward_pre_hook(lambda module, given: os._exit(1))
    try:
        model(**make_batch(1, 2, 12)).loss.backward()
    except RuntimeError as error:
        installation = find_installation(model)
        assert installation is not None
        return {"raised": type(error).__name__, "running": installation.model_call._lock.locked()}
    return {"raised": None}


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


def privates() -> dict[str, Any]:
    """What fxopt knows of torch's engines, each fact on a module sharded alone or in a group."""
    alone, first, second = (nn.Linear(4, 4) for _ in range(3))
    policy = MixedPrecisionPolicy(output_dtype=torch.float64)
    fully_shard(alone, mp_policy=policy)
    fully_shard([first, second])
    alone.register_forward_hook(lambda module, given, output: None)
    modules = (alone, first, second)
    hooks = [[*m._forward_pre_hooks.values(), *m._forward_hooks.values()] for m in modules]
    state = engines.fsdp_state_of(alone)
    before = engines.is_initialized(state)
    spread = [engines.is_dtensor(parameter) for parameter in (alone.weight, nn.Linear(4, 4).weight)]
    output = alone(torch.ones(2, 4))
    store = engines.shared_store("privates")
    store.set(f"{dist.get_rank()}", "1")
    ddp = DistributedDataParallel(nn.Linear(4, 4))
    inside_of: list[bool] = []
    ddp.module.register_forward_hook(lambda *_: inside_of.append(engines.active_ddp() is ddp))
    ddp(torch.ones(2, 4))
    return {
        "hooks": [[engines.is_fsdp_hook(hook) for hook in of_module] for of_module in hooks],
        "states": [
            engines.fsdp_state_of(first) is engines.fsdp_state_of(second),
            engines.fsdp_state_of(ddp) is None,
        ],
        "initialized": [before, engines.is_initialized(state)],
        "policy": [engines.policy_of(state) is policy, output.dtype is torch.float64],
        "group": dist.get_process_group_ranks(engines.group_of(state)) == list(range(dist.get_world_size())),
        "store": all(store.get(str(rank)) == b"1" for rank in range(dist.get_world_size())),
        "ddp": [*inside_of, engines.active_ddp() is None],
        "dtensor": spread,
        "managed": [engines.is_managed(module) for module in (alone, first, ddp.module)],
        "base": torch.Tensor._base.__get__ == engines.READ_OF_BASE,
    }


def accelerated(engine: str) -> dict[str, Any]:
    """Steps of accelerate's: prepared by default for DistributedDataParallel, or as its FSDP2 plugin does.

    accelerate takes the plugin on an accelerator only: here what it would call is called.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    rank = dist.get_rank()
    alone = make_model("llama")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for which in ("before", "stock"):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        model = copy.deepcopy(alone)
        if which == "before":
            model = fxopt.optimize(model, verify="off")
        if engine == "fsdp2":
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=[type(find_blocks(model)[0]).__name__],
                cpu_ram_efficient_loading=False,
            )
            accelerator.state.fsdp_plugin = plugin
            model = fsdp2_prepare_model(accelerator, model)
        else:
            model = accelerator.prepare(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number in range(2):
            optimizer.zero_grad()
            accelerator.backward(model(**make_batch(10 * number + rank, 2, 12)).loss)
            found[which] = gradients_of(model)
            optimizer.step()
        if which == "before":
            report = report_of(model)
    kinds = sorted({type(module).__name__ for module in model.modules() if engines.fsdp_state_of(module)})
    return {"errors": {"stock": largest_error(found["before"], found["stock"])}, "sharded": kinds, **report}


def trained(folder: str) -> dict[str, Any]:
    """Train by transformers' Trainer, which finds the process group by itself; return losses and parameters' sums."""
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    results: dict[str, Any] = {}
    for which in ("before", "stock"):
        AcceleratorState._reset_state(reset_partial_state=True)
        model = make_model("llama")
        if which == "before":
            model = fxopt.optimize(model, verify="off")
        rows = [{name: value[0] for name, value in make_batch(n, 1, 12).items()} for n in range(16)]
        arguments = TrainingArguments(
            folder,
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            use_cpu=True,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        results[which] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if which == "before":
            report = report_of(model)
    return {"losses": results, **report}


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
        module.weight.data = torch.empty(0)

    module.register_forward_pre_hook(gather)
    module.register_forward_hook(free)
    free(module, None, None)


def tensor_parallel() -> dict[str, Any]:
    """A model under a plan of transformers' own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
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


def save(folder: str, order: str, arch: str = "llama") -> dict[str, Any]:
    """Train a step under FSDP2, save model and optimizer, and return what the next step's loss is."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = _trained(order, arch)
    own, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": own, "optimizer": state}, checkpoint_id=folder)
    return {"loss": _next_loss(model, optimizer)}


def load(folder: str, order: str, arch: str = "llama") -> dict[str, Any]:
    """Load what `save` wrote, under this world size, and return what the next step's loss is."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = _trained(order, arch, seed=5)
    own, state = get_state_dict(model, optimizer)
    checkpoint.load({"model": own, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=own, optim_state_dict=state)
    return {"loss": _next_loss(model, optimizer)}


def _trained(order: str, arch: str, seed: int = 3) -> tuple[Any, Any]:
    model = build("fsdp2", order, make_model(arch), {})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(**make_batch(seed, 2, 12)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _next_loss(model: Any, optimizer: Any) -> list[float]:
    """Train one step more, on the same batch on all ranks, and return the losses before and after it."""
    losses: list[float] = []
    for _ in range(2):
        loss = model(**make_batch(4, 2, 12)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    case.__name__: case
    for case in (
        step,
        accumulate,
        ignored,
        collectives,
        differ,
        one_falls_back,
        one_stock,
        killed,
        logits,
        privates,
        accelerated,
        trained,
        gathered_by_hooks,
        tensor_parallel,
        save,
        load,
    )
}


def main() -> None:
    """Answer each line of stdin until it ends."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    torch.set_num_threads(1)
    seconds = int(os.environ.get("FXOPT_TEST_TIMEOUT", "120"))
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
    channel.write("ready\n")
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = CASES[name](**arguments)
        except Exception:
            answer = {"error": traceback.format_exc()}
        channel.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
