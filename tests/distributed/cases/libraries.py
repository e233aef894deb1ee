"""Training loops of other libraries: accelerate, and transformers' Trainer."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import torch.distributed as dist

import fxopt
from cases.models import ON_GPU, find_blocks, gradients_of, largest_error, make_batch, make_model, report_of
from fxopt.capture import torch_distributed as engines


def accelerated(engine: str) -> dict[str, Any]:
    """Steps of accelerate's: prepared by default for DistributedDataParallel, or by its FSDP2 plugin."""
    rank = dist.get_rank()
    alone = make_model("llama")
    found: dict[str, dict[str, torch.Tensor]] = {}
    kinds: dict[str, list[str]] = {}
    for which in ("before", "stock"):
        model = copy.deepcopy(alone)
        if which == "before":
            model = fxopt.optimize(model, verify="off")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        accelerator, model, optimizer = _prepare(engine, model, optimizer)
        for number in range(2):
            optimizer.zero_grad()
            accelerator.backward(model(**make_batch(10 * number + rank, 2, 12)).loss)
            found[which] = gradients_of(model)
            optimizer.step()
        if which == "before":
            report = report_of(model)
        kinds[which] = sorted({type(m).__name__ for m in model.modules() if engines.fsdp_state_of(m)})
    return {"errors": {"stock": largest_error(found["before"], found["stock"])}, "sharded": kinds, **report}


def _prepare(engine: str, model: Any, optimizer: Any) -> tuple[Any, Any, Any]:
    """Return accelerate's own, and what it makes of model and optimizer.

    It takes its FSDP2 plugin on an accelerator only: on a CPU what it would call is called.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = None
    if engine == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[type(find_blocks(model)[0]).__name__],
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(cpu=not ON_GPU, fsdp_plugin=plugin if ON_GPU else None)
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # set for all that come after, where a plugin is given
    if plugin is None or ON_GPU:
        return accelerator, *accelerator.prepare(model, optimizer)
    accelerator.state.fsdp_plugin = plugin
    model = fsdp2_prepare_model(accelerator, model)
    return accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1)


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
        rows = [{name: value[0].cpu() for name, value in make_batch(n, 1, 12).items()} for n in range(16)]
        arguments = TrainingArguments(
            folder,
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            use_cpu=not ON_GPU,
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
