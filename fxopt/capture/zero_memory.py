"""What DeepSpeed's ZeRO-3 makes of the memory that a model's parameters need on one rank, in bytes.

A part of each parameter lies on every rank; small ones stay gathered (`stage3_param_persistence_threshold`). The engine
keeps the parts that it trains in fp32 too, the parts of their gradients, and a bucket (`reduce_bucket_size`) that whole
gradients are copied to as backward makes them; a full bucket is reduced from a copy. A parameter is freed behind the
region that reads it, unless it is read again within `stage3_max_reuse_distance`; from the third step on parameters are
gathered ahead, with the next bucket (`stage3_prefetch_bucket_size`) at each module, up to `stage3_max_live_parameters`.
What a bucket was received in is freed with the last parameter out of it that is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from fxopt.capture.deepspeed_private import (
    Stage3,
    find_stage_3,
    is_partitioned,
    num_items,
    second_shard_of,
    shard_of,
    stays_gathered,
)


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What is gathered at most: `whole_bytes` while blocks run, `outside_bytes` more where others are needed too.

    `moved_bytes` is what a module's parameters are received in, `ahead_bytes` what those gathered ahead are; in
    backward none are where all stay since forward.
    """

    whole_bytes: int
    outside_bytes: int
    moved_bytes: int
    ahead_bytes: int = 0
    ahead_in_backward: bool = False


@dataclasses.dataclass(frozen=True)
class Reductions:
    """What gradients are reduced in: a bucket that always lives, and what one reduction needs beside it.

    A bucket is reduced before the end of backward `within_blocks` or `behind_blocks`, where it gets full.
    """

    bucket_bytes: int = 0
    bytes: int = 0
    within_blocks: bool = False
    behind_blocks: bool = False


@dataclasses.dataclass(frozen=True)
class ZeroMemory:
    """The memory of one model under ZeRO-3.

    `tensors` are the ids of the parameters it keeps, and of their parts. `held_bytes` live all the time, the states of
    the optimizer left out: these are of `trained_bytes` each; `update_bytes` of gradients are there at its step.
    """

    tensors: frozenset[int]
    held_bytes: int
    trained_bytes: int
    update_bytes: int
    gathered: Gathered
    reductions: Reductions


def find_memory(model: nn.Module, blocks: Sequence[nn.Module]) -> ZeroMemory | None:
    """Return what ZeRO-3 makes of the parameters of `model`, whose blocks run one after the other, or None."""
    parameters = [each for each in model.parameters() if is_partitioned(each)]
    if not parameters:
        return None
    engine = find_stage_3(parameters)
    device = parameters[0].device
    kept = [tensor for each in parameters for tensor in (shard_of(each), second_shard_of(each))]
    kept = [tensor for tensor in kept if tensor is not None]
    trained: Sequence[torch.Tensor] = [shard_of(each) for each in parameters if each.requires_grad]
    gradients, reductions = trained, Reductions()
    if engine is not None:
        trained = engine.masters
        gradients = [engine.gradients]
        reductions = _find_reductions(parameters, blocks, engine)
    masters = [each for each in trained if each.device.type == device.type]
    updated = [each.nbytes for each in masters]
    storages = storages_of(device, (*kept, *masters, *gradients))
    if engine is None:  # parts of gradients are not there yet
        storages += sum(updated)
    return ZeroMemory(
        tensors=frozenset(map(id, (*parameters, *kept))),
        held_bytes=storages + _whole_bytes(filter(stays_gathered, parameters)) + reductions.bucket_bytes,
        trained_bytes=sum(updated),
        update_bytes=sum(updated) if engine is None else max(updated, default=0),
        gathered=_find_gathered(model, parameters, blocks, engine),
        reductions=reductions,
    )


def _find_gathered(
    model: nn.Module, parameters: Sequence[nn.Parameter], blocks: Sequence[nn.Module], engine: Stage3 | None
) -> Gathered:
    """Return what is gathered by `engine`, None where it is not known yet."""
    of_blocks = [_kept_in(block) for block in blocks]
    inside = {id(each) for of_block in of_blocks for each in of_block}
    outside_bytes = _freed_bytes(each for each in parameters if id(each) not in inside)
    moved_bytes = max((_freed_bytes(_kept_in(each, recurse=False)) for each in model.modules()), default=0)
    needed = max(map(_freed_bytes, of_blocks), default=0)
    if engine is None:
        return Gathered(needed, outside_bytes, moved_bytes)
    distance = staying = 0
    for of_block in reversed(of_blocks):
        if distance < engine.reused:  # before it is read again in backward
            staying += _freed_bytes(of_block)
        distance += 2 * sum(map(num_items, of_block))
    needed = max(needed, staying)
    if not engine.prefetched:
        return Gathered(needed, outside_bytes, moved_bytes)
    size = max(each.element_size() for each in parameters)
    freed = [each for each in parameters if id(each) in inside and not stays_gathered(each)]
    largest = max(
        (_whole_bytes([each]) for each in freed), default=0
    )  # a bucket is closed when it is overfull
    early = min(_freed_bytes(parameters), engine.living * size)
    whole = max(needed, early)
    return Gathered(
        whole,
        max(needed + outside_bytes - whole, 0),
        moved_bytes,
        min(_whole_bytes(freed), engine.prefetched * size + largest),
        ahead_in_backward=staying < _whole_bytes(freed),
    )


def _find_reductions(
    parameters: Sequence[nn.Parameter], blocks: Sequence[nn.Module], engine: Stage3
) -> Reductions:
    trained = [each for each in parameters if each.requires_grad]
    total = sum(map(num_items, trained))
    inside = sum(num_items(each) for block in blocks for each in _kept_in(block) if each.requires_grad)
    largest = max(trained, key=num_items)
    size, items = engine.bucket_items, [dtype.itemsize for dtype in engine.bucket_dtypes]
    copied = min(max(size, num_items(largest)), total) * max(items)
    alone = _whole_bytes([largest]) if num_items(largest) > size else 0  # it waits where backward left it
    bucket = size if engine.is_contiguous else min(size, total)
    return Reductions(bucket * sum(items), copied + alone, total > size, total - inside > size)


def _kept_in(module: nn.Module, *, recurse: bool = True) -> list[nn.Parameter]:
    return [each for each in module.parameters(recurse=recurse) if is_partitioned(each)]


def _freed_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Return what those of `parameters` take while they are gathered that are freed again."""
    return _whole_bytes(each for each in parameters if not stays_gathered(each))


def _whole_bytes(parameters: Iterable[torch.Tensor]) -> int:
    return sum(num_items(each) * each.element_size() for each in parameters)


def storages_of(device: torch.device, tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages of `tensors` on `device`: some of them may be parts of one."""
    storages = [each.untyped_storage() for each in tensors if each.device.type == device.type]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
