"""DeepSpeed adds up gradients in the order in which they come: ranks agree on that order before each backward pass.

A captured region hands on the gradients of all its parameters at once, in the order of its graph's inputs; stock code
hands on one after the other. Ranks whose orders differ would add up gradients of different parameters, or wait for
each other in different collectives. So each backward pass begins with one reduction of a digest, on the host and in a
group of its own: nothing waits for a device. Where digests differ, all ranks raise the same error before any gradient
is handed on. A block that runs with gradients in backward only is agreed on then, before its own are.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fxopt.capture import deepspeed_private, torch_distributed, torch_dynamo, torch_tensors, zero
from fxopt.capture.lazy import LazyLogits
from fxopt.capture.ledger import NOT_CAPTURED, Ledger, Way
from fxopt.capture.modules import tensors_of
from fxopt.errors import RanksDifferError
from fxopt.report.records import MODEL_REGION

Ways = Mapping[str, Way]
CURE = (
    "let it run alike on every rank, or call fxopt.restore(model) on all; under ZeRO-3 a reduce_bucket_size that holds "
    "all gradients needs no order"
)


def order_of(values: Sequence[Any], region: nn.Module) -> tuple[int, ...]:
    """Return which tensors of `region` the inputs `values` of a graph are that get a gradient, by number.

    It is asked while the region runs: a `named_modules` of its own may change what it holds.
    """
    numbers = {id(tensor): number for number, tensor in enumerate(tensors_of(region))}
    return tuple(numbers[id(value)] for value in values if id(value) in numbers and value.requires_grad)


def reduces_as_they_come(parameters: Iterable[torch.Tensor]) -> bool:
    """Return whether the engine of ZeRO that trains `parameters` adds up gradients in the order in which they come.

    ZeRO-1 waits for all of them but with `overlap_comm`. ZeRO-3 sorts those of one bucket, so one that holds all of
    them has one order. An engine that is not found may do either.
    """
    trained = [parameter for parameter in parameters if deepspeed_private.is_trained(parameter)]
    if not trained:
        return False
    try:
        of_3 = deepspeed_private.find_stage_3(trained)
        if of_3 is not None:
            return not (of_3.scatters and sum(map(deepspeed_private.num_items, trained)) <= of_3.bucket_items)
        of_2 = deepspeed_private.find_stages_1_and_2(trained)
    except deepspeed_private.MovedError:
        return True
    return of_2 is None or of_2.keeps_parts or of_2.overlaps


class GradientOrder:
    """The order in which one model hands on gradients, agreed on between the ranks of its engine."""

    def __init__(self, model: nn.Module, ledger: Ledger) -> None:
        self._model, self._ledger = model, ledger
        self._is_judged = False
        self._group: Any = None
        self._late: frozenset[str] = frozenset()

    def run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what `call` returns, a training call; backward passes through it begin with an agreement."""
        if self._ledger.ways is not None:  # within such a call
            return call(*args, **kwargs)
        if not self._is_judged:
            self._judge()
        ways = self._ledger.ways = {}
        try:
            output = call(*args, **kwargs)
        finally:
            self._ledger.ways = None
        self._late |= {path for path, way in ways.items() if way.is_late}
        if self._group is not None:
            self._watch(output, ways)
        return output

    @torch_dynamo.untraced
    def _judge(self) -> None:
        """Find the ranks to agree with, as soon as an engine trains the model: none where its order is its own."""
        if torch_distributed.num_ranks() < 2:
            return
        group = zero.group_of(self._model)
        if group is None:
            return
        ranks, parameters = dist.get_process_group_ranks(group), tuple(self._model.parameters())
        if len(ranks) > 1 and reduces_as_they_come(parameters):
            self._group = torch_distributed.make_host_group(ranks)
        # Weights may be spread over ranks before an engine trains them.
        self._is_judged = self._group is not None or any(map(deepspeed_private.is_trained, parameters))

    def _watch(self, output: Any, ways: Ways) -> None:
        agree = functools.cache(functools.partial(self._agree, ways))  # once for all tensors

        def begin_backward(gradient: torch.Tensor) -> None:
            agree()

        for tensor in _tensors_in(output):
            if isinstance(tensor, LazyLogits):
                tensor.hook_later(begin_backward)
            elif tensor.requires_grad:
                tensor.register_hook(begin_backward)

    def note_late(self, path: str) -> None:
        """Agree on how the block at `path` ran in backward, where the model's call ran it without gradients."""
        if self._group is not None and path in self._late and torch_tensors.is_in_backward():
            self._agree({path: self._ledger.way})

    def _agree(self, ways: Ways) -> None:
        """Check that all ranks hand on gradients in one order.

        Raises:
            RanksDifferError: on every rank, where two differ.
        """
        orders = sorted((path, way.orders) for path, way in ways.items() if way.orders is not None)
        digest = int.from_bytes(hashlib.sha256(repr(orders).encode()).digest()[:7])
        ends = torch.tensor([digest, -digest])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._group)
        if ends[0] == -ends[1]:
            return
        found: list[Any] = [None] * dist.get_world_size(self._group)
        mine = {path: dataclasses.astuple(way) for path, way in ways.items()}
        dist.all_gather_object(found, mine, group=self._group)
        ranks = dist.get_process_group_ranks(self._group)
        each = [{path: Way(*way) for path, way in of_rank.items()} for of_rank in found]
        raise RanksDifferError(_say(dict(zip(ranks, each, strict=True))))


def _say(found: Mapping[int, Ways]) -> str:
    """Return what differs between ranks, of the first region that does."""
    first, *others = found
    for path in dict.fromkeys(path for ways in found.values() for path in ways):
        way = found[first].get(path, NOT_CAPTURED)
        for rank in others:
            other = found[rank].get(path, NOT_CAPTURED)
            if other.orders == way.orders:
                continue
            name = "what stands after the blocks" if path == MODEL_REGION else path
            differs = f"got {way} on rank {first} and {other} on rank {rank}"
            if way.orders and other.orders:
                differs += f", which read parameters in the orders {way.orders} and {other.orders}"
            return (
                f"gradients: ranks differ in how {name} runs, expected the same on every rank, since DeepSpeed adds up "
                f"gradients in the order in which they come (ZeRO-2, ZeRO-3, overlap_comm), {differs}\n{CURE}"
            )
    raise AssertionError("digests differ, expected ranks to differ in how a region runs")


def _tensors_in(output: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in what a model returned, as far inside as DeepSpeed looks for where backward begins."""
    if isinstance(output, torch.Tensor):
        yield output
    inside: Iterable[Any] = ()
    if isinstance(output, Mapping):
        inside = output.values()
    elif isinstance(output, list | tuple):
        inside = output
    for value in inside:
        yield from _tensors_in(value)
