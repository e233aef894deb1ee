"""What DeepSpeed's ZeRO-1 and ZeRO-2 make of the memory that a model's parameters need on one rank, in bytes.

Parameters stay whole, one behind the other in a tensor. Each rank trains its part of that, from a copy in fp32.
Gradients are copied to a bucket (`reduce_bucket_size`, two with `overlap_comm`), which is there from the first gradient
to the end of backward; a full one is reduced, out of a copy where it belongs to several ranks. What a rank keeps of
them is copied to a buffer of its own, made when the first bucket is reduced. ZeRO-1 does all that at the end of
backward, ZeRO-2 as gradients come. Without `contiguous_gradients` they wait where backward left them.

Ranks must plan alike: where the parts of two differ, the larger counts, and the first reduction stands for both's.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from fxopt.capture.deepspeed_private import Partitions, Stages1And2, find_stages_1_and_2
from fxopt.capture.modules import walk
from fxopt.capture.zero_memory import storages_of


@dataclasses.dataclass(frozen=True)
class Backward:
    """What lives beside one region's backward: `bytes` while it runs, `reduced_bytes` more when its gradients come."""

    bytes: int = 0
    reduced_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class PartitionMemory:
    """The memory of one model under ZeRO-1 or ZeRO-2.

    `tensors` are the ids of the parameters it trains. `held_bytes` live all the time, the states of the optimizer left
    out: these are of `trained_bytes` each; `update_bytes` of gradients are there at its step. `end_bytes` are there
    when backward ends, beside gradients that are not in the engine's buffers: those of what follows the blocks where
    it `is_tied`, those of blocks unless the engine `holds_gradients`.
    """

    tensors: frozenset[int]
    held_bytes: int
    trained_bytes: int
    update_bytes: int
    tail: Backward
    blocks: tuple[Backward, ...]
    end_bytes: int
    holds_gradients: bool
    is_tied: bool


def find_partitions(model: nn.Module, blocks: Sequence[nn.Module]) -> PartitionMemory | None:
    """Return what ZeRO-1 or ZeRO-2 makes of the parameters of `model`, whose blocks run one after the other, or None.

    Raises:
        MovedError: DeepSpeed has something elsewhere than fxopt looks for it.
    """
    engine = find_stages_1_and_2(model.parameters())
    if engine is None:
        return None
    trained = [parameter for group in engine.groups for parameter in group.parameters]
    device = trained[0].device
    masters = [group.master for group in engine.groups if group.master.device.type == device.type]
    staged = [] if engine.staged is None else [engine.staged]
    gradients = _Gradients(engine)
    within = engine.keeps_parts or engine.overlaps
    holds = (within and (engine.is_contiguous or engine.keeps_parts)) or engine.micro_batches > 1
    accumulated = 0
    if engine.micro_batches > 1:
        accumulated = gradients.kept_bytes if engine.keeps_parts else _num_bytes(trained)
    before, *of_blocks, after = _regions_of(model, blocks, trained)
    order = [after, *reversed(of_blocks), before]
    regions = [gradients.come(region, reduces=within) for region in order]
    tied_bytes = _tied_bytes(model, blocks, trained)
    came = regions[-1].bytes + _num_bytes(before) + regions[-1].reduced_bytes
    reduced = gradients.finish(() if within else trained) + (0 if within else _num_bytes(before)) - tied_bytes
    return PartitionMemory(
        tensors=frozenset(map(id, trained)),
        held_bytes=storages_of(device, [*(group.whole for group in engine.groups), *masters, *staged])
        + accumulated,
        trained_bytes=sum(master.nbytes for master in masters),
        update_bytes=max(gradients.update_bytes - accumulated, 0),
        tail=regions[0],
        blocks=tuple(reversed(regions[1:-1])),
        end_bytes=max(came, reduced),
        holds_gradients=holds,
        is_tied=tied_bytes > 0,
    )


def _regions_of(
    model: nn.Module, blocks: Sequence[nn.Module], trained: Sequence[torch.Tensor]
) -> Iterator[list[nn.Parameter]]:
    """Yield which of `trained` stand before the blocks, in each, and behind: in the order of their registration."""
    left = {id(parameter) for parameter in trained}
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    own = [parameter for parameter in model.parameters() if id(parameter) in left]
    first = next((number for number, each in enumerate(own) if id(each) in inside), len(own))
    yield own[:first]
    for block in blocks:
        yield [each for each in block.parameters() if id(each) in left]
    yield [each for each in own[first:] if id(each) not in inside]


def _tied_bytes(model: nn.Module, blocks: Sequence[nn.Module], trained: Sequence[torch.Tensor]) -> int:
    """Return the bytes of the largest of `trained` that two modules outside the blocks hold, 0 where there is none."""
    left = {id(parameter) for parameter in trained}
    outside = walk(model, but=frozenset(blocks))
    held = [each for module in outside for each in module.parameters(recurse=False) if id(each) in left]
    times = collections.Counter(map(id, held))
    return max((each.nbytes for each in held if times[id(each)] > 1), default=0)


class _Gradients:
    """The gradients of a backward pass as they come: what waits for a reduction, and what lives for it."""

    def __init__(self, engine: Stages1And2) -> None:
        self._engine = engine
        self._owners = {
            id(each): (number, *parts)
            for number, group in enumerate(engine.groups)
            for each, parts in zip(group.parameters, _parts_of(group), strict=True)
        }
        self.kept_bytes = self._find_kept()
        self._waiting: list[torch.Tensor] = []
        self._has_begun = self._has_reduced = False

    @property
    def _is_summed_apart(self) -> bool:
        """Whether parts are summed in a dtype of their own, in a buffer that stays over micro-batches."""
        return self._engine.sum_dtype != self._engine.dtype

    def _find_kept(self) -> int:
        """Return what a rank keeps of the gradients after backward: whole ones, also at the borders of its parts."""
        engine = self._engine
        if self._is_summed_apart:
            return sum(group.part_items for group in engine.groups) * engine.sum_dtype.itemsize
        if engine.offloads:
            return 0
        kept: collections.Counter[int] = collections.Counter()
        for group in engine.groups:
            for parameter, parts in zip(group.parameters, _parts_of(group), strict=True):
                kept.update(dict.fromkeys(parts, parameter.numel()))
        return max(kept.values()) * engine.dtype.itemsize

    @property
    def update_bytes(self) -> int:
        """What there is of gradients at the optimizer's step: what was kept, one flat part, and that in fp32."""
        engine = self._engine
        if self._is_summed_apart or engine.offloads:
            return self.kept_bytes
        return self.kept_bytes + max(
            group.part_items * engine.dtype.itemsize
            + (group.master.nbytes if group.master.dtype != engine.dtype else 0)
            for group in engine.groups
        )

    def come(self, region: Sequence[torch.Tensor], *, reduces: bool) -> Backward:
        """Return what lives beside the backward of a region, whose gradients are reduced when a bucket is full."""
        before, most = self._living_bytes(self._waiting), 0
        num_earlier = len(self._waiting)
        for parameter in reversed(region):
            if reduces:
                if self._is_full(parameter):
                    most = max(most, self._reduce(num_earlier) - before)
                    num_earlier = 0
                self._waiting.append(parameter)
            self._has_begun = True
            most = max(most, self._living_bytes(self._waiting[:num_earlier]) - before)
        return Backward(before, most)

    def finish(self, trained: Sequence[torch.Tensor]) -> int:
        """Return the most that lives at the end of backward, when `trained` are reduced, or what still waits.

        Gradients of `trained` that went to a bucket are no longer beside it.
        """
        most, moved = self._living_bytes(self._waiting), 0
        for parameter in trained:
            if self._is_full(parameter):
                most = max(most, self._reduce(0) - moved)
            self._waiting.append(parameter)
            moved += parameter.nbytes if self._goes_to_bucket(parameter) else 0
        return max(most, self._reduce(0 if trained else len(self._waiting)) - moved)

    def _is_full(self, parameter: torch.Tensor) -> bool:
        items = _num_items(self._waiting)
        return bool(items) and items + parameter.numel() > self._engine.bucket_items

    def _reduce(self, num_beside: int) -> int:
        """Reduce what waits, and return the most that lives meanwhile; `num_beside` may be beside a bucket."""
        beside = self._waiting[:num_beside]
        most = self._living_bytes(beside) + self._copied_bytes(self._waiting)
        self._has_reduced = self._has_reduced or bool(self._waiting)
        self._waiting = []
        return max(most, self._living_bytes(beside))

    def _living_bytes(self, beside: Iterable[torch.Tensor]) -> int:
        """Return what lives of buckets, of kept parts and of those gradients `beside` that are in no bucket."""
        engine = self._engine
        has_bucket = self._has_begun and engine.is_contiguous
        buckets = len(engine.bucket_dtypes) * (2 if engine.overlaps else 1) if has_bucket else 0
        alone = _num_bytes(each for each in beside if not self._goes_to_bucket(each))
        has_parts = self._has_reduced and (engine.is_contiguous or engine.keeps_parts)
        kept = self.kept_bytes if has_parts else 0
        return buckets * engine.bucket_items * engine.dtype.itemsize + alone + kept

    def _goes_to_bucket(self, parameter: torch.Tensor) -> bool:
        return self._engine.is_contiguous and parameter.numel() <= self._engine.bucket_items

    def _copied_bytes(self, waiting: Sequence[torch.Tensor]) -> int:
        """Return what the gradients that wait are copied to while they are reduced."""
        engine = self._engine
        owners = {(number, part) for number, *parts in map(self._owners_of, waiting) for part in parts}
        is_apart = (len(owners) > 1 or self._is_summed_apart) and engine.scatters
        is_copied = is_apart if engine.is_contiguous else len(waiting) > 1
        cast = max(dtype.itemsize for dtype in engine.bucket_dtypes)
        is_cast = any(dtype != engine.dtype for dtype in engine.bucket_dtypes)
        return _num_items(waiting) * ((engine.dtype.itemsize if is_copied else 0) + (cast if is_cast else 0))

    def _owners_of(self, parameter: torch.Tensor) -> tuple[int, ...]:
        return self._owners[id(parameter)]


def _parts_of(group: Partitions) -> Iterator[range]:
    """Yield the numbers of the parts that each parameter of a group has items in."""
    for parameter, begin in zip(group.parameters, group.offsets, strict=True):
        end = begin + max(parameter.numel(), 1) - 1
        yield range(begin // group.part_items, end // group.part_items + 1)


def _num_items(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
