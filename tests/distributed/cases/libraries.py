"""Training loops of other libraries: accelerate, and transformers' Trainer."""

from __future__ import annotations

import os
from typing import Any

import torch
from cases.models import ON_GPU, find_blocks, make_batch, make_model, report_of

import fxopt
from fxopt.capture import torch_distributed as engines


def accelerated(engine: str) -> dict[str, list[str]]:
    """Return the kinds of modules that accelerate shards, optimized before it prepares the model, after, and stock."""
    kinds: dict[str, list[str]] = {}
    for which in ("before", "after", "stock"):
        model = make_model("llama")
        if which == "before":
            model = fxopt.optimize(model, verify="off")
        _, model, _ = prepare(engine, model, torch.optim.SGD(model.parameters(), lr=0.1))
        if which == "after":
            fxopt.optimize(model, verify="off")
        kinds[which] = sorted({type(m).__name__ for m in model.modules() if engines.fsdp_state_of(m)})
    return kinds


def prepare(engine: str, model: Any, optimizer: Any) -> tuple[Any, Any, Any]:
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


def trained(folder: str, library: str, lora: bool = False, stage: int = 0) -> dict[str, Any]:
    """Train by transformers' Trainer or TRL's, which find the process group by themselves.

    Optimized before, by a callback after they have put the model under their engine, and stock; return what they log.
    That engine is DistributedDataParallel, or a `stage` of ZeRO with gradients in several buckets.
    """
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    answer: dict[str, Any] = {}
    kept = ("loss", "grad_norm", "mean_token_accuracy")
    for which in ("before", "after", "stock"):
        AcceleratorState._reset_state(reset_partial_state=True)
        model = make_model("llama", lora)
        if which == "before":
            model = fxopt.optimize(model, verify="off")
        batches = [make_batch(number, 1, 12, ignored=number % 5 == 0) for number in range(32)]
        rows = [{name: value[0].cpu() for name, value in batch.items()} for batch in batches]
        trainer = _make_trainer(library, model, rows, folder, stage)
        if which == "after":
            trainer.add_callback(_make_optimizing())
        trainer.train()
        unset_hf_deepspeed_config()  # a model made later would be spread over ranks from the beginning
        logged = [row for row in trainer.state.log_history if "loss" in row]
        figures = [[row[name] for name in kept if name in row] for row in logged]
        answer[which] = {"figures": figures, **({} if which == "stock" else report_of(model))}
    return answer


def _make_optimizing() -> Any:
    from transformers import TrainerCallback

    class Optimizing(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            fxopt.optimize(model, verify="off")

    return Optimizing()


def _make_trainer(
    library: str, model: Any, rows: list[dict[str, torch.Tensor]], folder: str, stage: int
) -> Any:
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
    if stage:
        settings["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 3000},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
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
