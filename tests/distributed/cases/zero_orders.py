"""Ranks whose regions hand on gradients in other orders than those of the others."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from cases.models import find_blocks, largest_error, make_batch, make_model, report_of
from cases.zero import initialize
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.capture import orders, zero

SEVERAL_BUCKETS = {"reduce_bucket_size": 3000}


def zero_orders(stage: int, hooked: str, overlap: bool = False, machine: int = 1) -> dict[str, Any]:
    """Three steps under a stage of ZeRO whose gradients fill several buckets: optimized against stock.

    In the second one the last rank has a form of batch that it alone has met. In the third a hook sits in a block or on
    the head (`hooked`) of the last rank, or in a block of all ranks; what that raises is told. ZeRO-3 may gather for
    backward within a `machine` of so many ranks (hpZ).
    """
    from deepspeed.utils import safe_get_full_grad

    rank, world = dist.get_rank(), dist.get_world_size()
    alone = make_model("llama")
    settings = {**SEVERAL_BUCKETS, "overlap_comm": overlap, "zero_hpz_partition_size": machine}
    engines = {
        which: initialize(fxopt.optimize(model) if which == "before" else model, stage, **settings)
        for which, model in (("before", copy.deepcopy(alone)), ("stock", copy.deepcopy(alone)))
    }
    errors: list[float] = []
    raised = text = ""
    for number in range(3):
        batch: dict[str, Any] = make_batch(10 * number + rank, 1 + rank, 12 + 4 * rank)
        if number == 1 and rank == world - 1:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, :3] = 0
        if number == 2 and (rank == world - 1 or hooked == "all"):
            _hook(engines["before"].module, hooked)
        found: dict[str, dict[str, torch.Tensor]] = {}
        for which, engine in engines.items():
            loss = engine(**batch).loss
            try:
                engine.backward(loss)
            except fxopt.FxoptError as error:
                raised, text = type(error).__name__, str(error)
                break
            named = engine.module.named_parameters()
            found[which] = {name: safe_get_full_grad(p).to("cpu", copy=True) for name, p in named}
            engine.step()
        else:
            errors.append(largest_error(found["before"], found["stock"]))
    return {"errors": errors, "raised": raised, "text": text, **report_of(engines["before"].module)}


def _hook(model: Any, place: str) -> None:
    module = model.get_output_embeddings() if place == "head" else find_blocks(model)[0].mlp
    module.register_forward_hook(lambda *_: None)


class _Checkpointed(nn.Module):
    """A stack of layers whose first forward pass is without gradients: each runs with them in backward only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean of squares of the last layer's result."""
        x = self.first(x)
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=True)
        return x.pow(2).mean()


def zero_late(hooked: bool) -> dict[str, Any]:
    """Blocks run with gradients in backward alone, under ZeRO-2; one of the last rank's is `hooked`."""
    torch.manual_seed(0)
    model = fxopt.optimize(_Checkpointed().train())
    engine = initialize(model, 2, reduce_bucket_size=300)
    if hooked and dist.get_rank() == dist.get_world_size() - 1:
        model.layers[1][1].register_forward_hook(lambda *_: None)
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    loss = engine(rows.to(engine.device))
    raised = text = ""
    try:
        engine.backward(loss)
    except fxopt.FxoptError as error:
        raised, text = type(error).__name__, str(error)
    return {"raised": raised, "text": text, **report_of(model)}


def order_differs(hooked: list[int], read: str = "loss") -> dict[str, Any]:
    """As under an engine that adds up gradients as they come, which is no more than named here.

    A hook sits in a block of the ranks `hooked` at the second of two calls. Return what backward passes raise that
    begin at the loss, or at the logits (`read`), and what was reduced.
    """
    stock = zero.group_of, orders.reduces_as_they_come
    zero.group_of = lambda module: dist.group.WORLD
    orders.reduces_as_they_come = lambda parameters: True
    rank = dist.get_rank()
    raised: list[str] = []
    reduced: list[list[Any]] = []
    all_reduce = dist.all_reduce

    def reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.append([tensor.numel(), tensor.device.type])
        return all_reduce(tensor, *args, **kwargs)

    try:
        model = fxopt.optimize(make_model("llama"), verify="off")
        dist.all_reduce = reduce
        for number in range(2):
            if number == 1 and rank in hooked:
                find_blocks(model)[1].mlp.register_forward_hook(lambda *_: None)
            output = model(**make_batch(number + rank, 1 + rank, 12))
            loss = output.loss if read == "loss" else output.logits.float().pow(2).mean()
            try:
                loss.backward()
            except fxopt.RanksDifferError as error:
                raised.append(str(error))
                assert all(parameter.grad is None for parameter in model.parameters())
            model.zero_grad()
    finally:
        zero.group_of, orders.reduces_as_they_come = stock
        dist.all_reduce = all_reduce
    return {"raised": raised, "reduced": reduced, **report_of(model)}
