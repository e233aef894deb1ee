"""Train a small Llama on several processes: DistributedDataParallel, FSDP2, Trainer or DeepSpeed.

    torchrun --nproc-per-node 2 examples/distributed.py --engine ddp
    torchrun --nproc-per-node 2 examples/distributed.py --engine fsdp2
    torchrun --nproc-per-node 2 examples/distributed.py --engine trainer
    torchrun --nproc-per-node 2 examples/distributed.py --engine deepspeed

On GPUs over NCCL, else over gloo on a CPU. Prints the loss of each step, and what fxopt did, from the first rank.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fxopt


def make_rows(number: int, rank: int) -> torch.Tensor:
    """Return a batch of random tokens, another one for each step and rank."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randint(3, 512, (2, 64), generator=generator)


def train(model: Any, device: torch.device, steps: int) -> list[float]:
    """Train `model` and return the losses of this rank."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses: list[float] = []
    for number in range(steps):
        ids = make_rows(number, dist.get_rank()).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def train_by_deepspeed(model: Any, device: torch.device, steps: int) -> list[float]:
    """Train `model` under DeepSpeed's ZeRO-3 and return the losses of this rank."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    losses: list[float] = []
    for number in range(steps):
        ids = make_rows(number, dist.get_rank()).to(device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def train_by_trainer(model: Any, steps: int) -> list[float]:
    """Train `model` by transformers' Trainer and return the losses it logs."""
    rows = [{"input_ids": row, "labels": row} for number in range(steps) for row in make_rows(number, 0)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("ddp", "fsdp2", "trainer", "deepspeed"), default="ddp")
    parser.add_argument("--steps", type=int, default=3)
    chosen = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    model = fxopt.optimize(LlamaForCausalLM(config).to(device).train())
    if chosen.engine == "trainer":
        losses = train_by_trainer(model, chosen.steps)
    else:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if chosen.engine == "fsdp2":
            for block in model.model.layers:
                fully_shard(block)
            losses = train(fully_shard(model), device, chosen.steps)
        elif chosen.engine == "deepspeed":
            losses = train_by_deepspeed(model, device, chosen.steps)
        else:
            losses = train(DistributedDataParallel(model), device, chosen.steps)
    if dist.get_rank() == 0:
        print(f"{chosen.engine}: losses {', '.join(f'{loss:.3f}' for loss in losses)}")
        report = fxopt.explain(model)
        rewritten = sum(site.count for site in report.sites if site.status == "rewritten")
        fallbacks = sum(fallback.count for fallback in report.fallbacks)
        print(
            f"{rewritten} of {sum(site.count for site in report.sites)} sites rewritten, {fallbacks} fallbacks"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
