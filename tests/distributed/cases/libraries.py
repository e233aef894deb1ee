"""Training loops of other libraries: accelerate, and transformers' Trainer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cases.models import ON_GPU, find_blocks, make_batch, make_model, report_of, whole_of

import fxopt
from fxopt.capture import torch_distributed as engines

STEPS = 3


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
    """Return accelerate's own, and what it makes of model and optimizer."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = None
    if engine == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[type(find_blocks(model)[0]).__name__],
            cpu_ram_efficient_loading=False,
        )
    with _sharded_anywhere():
        accelerator = Accelerator(cpu=not ON_GPU, fsdp_plugin=plugin)
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # set for all that come after, where a plugin is given
    return accelerator, *accelerator.prepare(model, optimizer)


@contextmanager
def _sharded_anywhere() -> Iterator[None]:
    """Have accelerate take its FSDP2 plugin on a CPU too: by itself it takes it on an accelerator only."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    own = AcceleratorState.__init__

    def taking(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        own(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = taking
    try:
        yield
    finally:
        AcceleratorState.__init__ = own


def trained(folder: str, library: str, engine: str = "ddp", lora: bool = False) -> dict[str, Any]:
    """Train by transformers' Trainer or TRL's, which find the process group by themselves.

    Optimized before, by a callback after they have put the model under their engine, and stock; return what they log
    and, against stock, the largest relative error of what all steps together changed in a parameter. That engine is
    DistributedDataParallel (`"ddp"`), FSDP2 by accelerate's plugin, or a stage of ZeRO with gradients in several
    buckets (`"zero 3"`).
    """
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    answer: dict[str, Any] = {}
    stock: dict[str, torch.Tensor] = {}
    kept = ("loss", "grad_norm", "mean_token_accuracy")
    for which in ("stock", "before", "after"):
        AcceleratorState._reset_state(reset_partial_state=True)
        model = make_model("llama", lora)
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        initial = whole_of(model)
        if which == "before":
            model = fxopt.optimize(model, verify="off")
        batches = [make_batch(number, 1, 12, ignored=number % 5 == 0) for number in range(32)]
        rows = [{name: value[0].cpu() for name, value in batch.items()} for batch in batches]
        with _sharded_anywhere():
            trainer = _make_trainer(library, model, rows, folder, engine)
        if which == "after":
            trainer.add_callback(_make_optimizing())
        trainer.train()
        unset_hf_deepspeed_config()  # a model made later would be spread over ranks from the beginning
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        whole = whole_of(model)
        weights = {name: whole[name] for name in trainable}
        logged = [row for row in trainer.state.log_history if "loss" in row]
        answer[which] = {"figures": [[row[name] for name in kept if name in row] for row in logged]}
        if which == "stock":
            stock = weights
        else:
            answer[which] |= report_of(model) | {"error": change_error(weights, stock, initial)}
    return answer


def change_error(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], initial: dict[str, torch.Tensor]
) -> float:
    """Return the largest relative error of a parameter's change, beyond what rounding the parameter leaves open.

    Each step rounds a weight to within half an eps of it, in both runs.
    """
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    errors: list[float] = []
    for name, weight in expected.items():
        rounding = STEPS * torch.finfo(weight.dtype).eps * float(weight.norm())
        change = float((weight - initial[name]).norm())
        errors.append(max(0.0, float((found[name] - weight).norm()) - rounding) / change)
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def _make_optimizing() -> Any:
    from transformers import TrainerCallback

    class Optimizing(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            fxopt.optimize(model, verify="off")

    return Optimizing()


def _make_trainer(
    library: str, model: Any, rows: list[dict[str, torch.Tensor]], folder: str, engine: str
) -> Any:
    settings: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "use_cpu": not ON_GPU,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
    }
    if engine == "fsdp2":
        settings["fsdp"] = True
        settings["fsdp_config"] = {
            "version": 2,
            "transformer_layer_cls_to_wrap": [type(find_blocks(model)[0]).__name__],
            "cpu_ram_efficient_loading": False,
        }
    if engine.startswith("zero"):
        settings["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": int(engine.removeprefix("zero ")), "reduce_bucket_size": 3000},
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
