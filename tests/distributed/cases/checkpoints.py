"""Checkpoints of `torch.distributed.checkpoint`, saved and loaded under FSDP2."""

from __future__ import annotations

from typing import Any

import torch
from cases.models import build, make_batch, make_model


def save(folder: str, order: str, lora: bool = False) -> dict[str, Any]:
    """Train a step under FSDP2, save model and optimizer, and return what the next step's loss is."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = _trained(order, lora)
    own, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": own, "optimizer": state}, checkpoint_id=folder)
    return {"loss": _next_loss(model, optimizer)}


def load(folder: str, order: str, lora: bool = False) -> dict[str, Any]:
    """Load what `save` wrote, under this world size, and return what the next step's loss is."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = _trained(order, lora, seed=5)
    own, state = get_state_dict(model, optimizer)
    checkpoint.load({"model": own, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=own, optim_state_dict=state)
    return {"loss": _next_loss(model, optimizer)}


def _trained(order: str, lora: bool, seed: int = 3) -> tuple[Any, Any]:
    model = build("fsdp2", order, make_model("llama", lora), {})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
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
