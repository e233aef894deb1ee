"""Training loops of other libraries: accelerate, and transformers' Trainer."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import torch.distributed as dist
from cases.models import ON_GPU, find_blocks, gradients_of, largest_error, make_batch, make_model, report_of

import fxopt
from fxopt.capture import torch_distributed as engines


def accelerated(engine: str, order: str) -> dict[str, Any]:
    """Steps of accelerate's: prepared by default for DistributedDataParallel, or by its FSDP2 plugin.

    The model is optimized `before` it is prepared, or `after`.
    """
    rank = dist.get_rank()
    alone = make_model("llama")
    found: dict[str, dict[str, torch.Tensor]] = {}
    kinds: dict[str, list[str]] = {}
    for which in (order, "stock"):
        model = copy.deepcopy(alone)
        if which == "before":
            model = fxopt.optimize(model, verify="off")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        accelerator, model, optimizer = _prepare(engine, model, optimizer)
        if which == "after":
            model = fxopt.optimize(model, verify="off")
        for number in range(2):
            optimizer.zero_grad()
            accelerator.backward(model(**make_batch(10 * number + rank, 2, 12)).loss)
            found[which] = gradients_of(model)
            optimizer.step()
        if which == order:
            report = report_of(model)
        kinds[which] = sorted({type(m).__name__ for m in model.modules() if engines.fsdp_state_of(m)})
    return {"errors": {"stock": largest_error(found[order], found["stock"])}, "sharded": kinds, **report}


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


def trained(folder: str, library: str, lora: bool = False) -> dict[str, Any]:
    """Train by transformers' Trainer or TRL's, which find the process group by themselves; return what they log."""
    from accelerate.state import AcceleratorState

    logged: dict[str, list[dict[str, float]]] = {}
    for which in ("before", "stock"):
        AcceleratorState._reset_state(reset_partial_state=True)
        model = make_model("llama", lora)
        if which == "before":
            model = fxopt.optimize(model, verify="off")
        rows = [{name: value[0].cpu() for name, value in make_batch(n, 1, 12).items()} for n in range(16)]
        trainer = _make_trainer(library, model, rows, folder)
        trainer.train()
        logged[which] = [row for row in trainer.state.log_history if "loss" in row]
        if which == "before":
            report = report_of(model)
    kept = ("loss", "grad_norm", "mean_token_accuracy")
    figures = {
        which: [[row[name] for name in kept if name in row] for row in rows] for which, rows in logged.items()
    }
    return {"figures": figures, **report}


def _make_trainer(library: str, model: Any, rows: list[dict[str, torch.Tensor]], folder: str) -> Any:
    settings: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "use_cpu": not ON_GPU,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
    }
    if library == "transformers":
        from transformers import Trainer, TrainingArguments

        return Trainer(model, TrainingArguments(**settings), train_dataset=rows)
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(128)}, unk_token="w0"))
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings, max_length=12, gradient_checkpointing=False),
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2"),
    )
