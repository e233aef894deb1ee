"""Collectives of a step, counted."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from cases.models import find_blocks, inside, make_batch, make_model, report_of, wrap
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import fxopt
from fxopt.capture.lazy import LazyLogits

GIVEN = {
    "all_gather_single": "input_tensor",
    "reduce_scatter_single": "input",
    "all_gather_into_tensor": "input_tensor",
    "reduce_scatter_tensor": "input",
}
"""The name of what a rank gives, by collective; before torch 2.13 there are the last two alone."""
Started = list[tuple[str, int]]
"""Collectives in their order: what each does, and the size of what this rank gives."""


@contextlib.contextmanager
def collectives_listed() -> Iterator[Started]:
    """List the collectives that engines written in Python start within the scope."""
    started: Started = []
    names = tuple(name for name in GIVEN if hasattr(dist, name))
    stock = {name: getattr(dist, name) for name in names}

    def listed(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = kwargs[GIVEN[name]] if GIVEN[name] in kwargs else args[1]
            started.append(("gather" if "gather" in name else "reduce", given.numel()))
            return stock[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, listed(name))
    try:
        yield started
    finally:
        for name in names:
            setattr(dist, name, stock[name])


def collectives(
    engine: str,
    options: dict[str, Any] | None = None,
    checkpointed: bool = False,
    budget: str = "auto",
    host: str | None = None,
    hooked: bool = False,
) -> dict[str, Any]:
    """List the collectives of the second step, optimized and stock; of DDP the buckets that are reduced.

    With `host` memory adapters on six blocks are trained, whose values may leave; `hooked`, a block of the last rank
    falls back.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    rows, length = (4, 48) if host else (2, 12)
    order: dict[str, Started] = {}
    computed: dict[str, bool] = {}
    planned = host_bytes = 0
    for which in ("before", "stock"):
        model = make_model("llama", lora=True, num_hidden_layers=6) if host else make_model("llama")
        if checkpointed:
            model.gradient_checkpointing_enable()
        if which == "before":
            model = fxopt.optimize(model, memory_budget=budget, max_host_memory=host, verify="off")
        if hooked and rank == world - 1:
            find_blocks(model)[0].mlp.register_forward_hook(lambda module, given, output: None)
        model = wrap(engine, model, **(options or {}))
        buckets: Started = []
        if engine == "ddp":

            def reduce(state, bucket, buckets=buckets):  # torch reads annotations where there are any
                buckets.append(("bucket", bucket.buffer().numel()))
                return allreduce_hook(state, bucket)

            model.register_comm_hook(None, reduce)
        for number in range(2):
            buckets.clear()
            with collectives_listed() as started:
                output = model(**make_batch(number + rank, rows, length + 4 * rank))
                output.loss.backward()
        order[which] = [*started, *buckets]
        computed[which] = not (isinstance(output.logits, LazyLogits) and output.logits.is_lazy)
        if which == "before":
            report = report_of(model)
            plans = fxopt.explain(inside(model)).plans
            planned, host_bytes = len(plans), sum(plan.host_bytes for plan in plans)
    counts = {which: collections.Counter(kind for kind, _ in listed) for which, listed in order.items()}
    return {
        "counts": counts,
        "order": order,
        "computed": computed,
        "plans": planned,
        "host_bytes": host_bytes,
        **report,
    }
