"""Collectives of a step, counted."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from cases.models import inside, make_batch, make_model, report_of, wrap
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import fxopt
from fxopt.capture.lazy import LazyLogits


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
