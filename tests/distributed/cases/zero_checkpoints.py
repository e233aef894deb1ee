"""DeepSpeed's own checkpoints, saved and loaded under a stage of ZeRO."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch
import torch.distributed as dist
from cases.models import make_batch, make_model
from cases.zero import initialize

import fxopt

TAG, UNIVERSAL = "step", "universal"


def zero_save(folder: str, stage: int, order: str, universal: bool = False) -> dict[str, Any]:
    """Train a step, save what the engine saves, and return the losses of the next steps.

    `universal`: DeepSpeed's script makes of it what any number of processes can load.
    """
    engine = _trained(stage, order, {})
    engine.save_checkpoint(folder, tag=TAG)
    if universal and dist.get_rank() == 0:
        script = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        folders = ["--input_folder", f"{folder}/{TAG}", "--output_folder", f"{folder}/{UNIVERSAL}"]
        workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        done = subprocess.run([*script, *folders, *workers], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    dist.barrier()
    return {"loss": _next_losses(engine)}


def zero_load(folder: str, stage: int, order: str, universal: bool = False) -> dict[str, Any]:
    """Load what `zero_save` wrote into an engine that trained something else, and return its next losses."""
    engine = _trained(stage, order, {"load_universal": True} if universal else {}, seed=5)
    try:
        engine.load_checkpoint(folder, tag=UNIVERSAL if universal else TAG)
    except Exception as error:
        return {"raised": type(error).__name__, "text": str(error)}
    return {"loss": _next_losses(engine), "fallbacks": _count_fallbacks(engine, order)}


def _count_fallbacks(engine: Any, order: str) -> int:
    return 0 if order == "stock" else len(fxopt.explain(engine.module).fallbacks)


def _trained(stage: int, order: str, checkpoint: dict[str, Any], seed: int = 3) -> Any:
    model = make_model("llama")
    if order == "before":
        model = fxopt.optimize(model, verify="off")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine = initialize(model, stage, optimizer=optimizer, checkpoint=checkpoint)
    if order == "after":
        fxopt.optimize(engine.module, verify="off")
    engine.backward(engine(**make_batch(seed, 2, 12)).loss)
    engine.step()
    return engine


def _next_losses(engine: Any) -> list[float]:
    """Train two steps more, on the same batch on all ranks, and return the loss before each of them."""
    losses: list[float] = []
    for _ in range(2):
        loss = engine(**make_batch(4, 2, 12)).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses
