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
from typing import Any

import torch
from torch import nn

from fxopt.capture import zero

OPTIMIZER = "_z3_optimizer"
"""Where a parameter has the engine that trains it."""
PREFETCHED, REUSED, LIVING = (
    "_prefetch_bucket_sz",
    "_max_reuse_distance_in_numel",
    "_max_available_parameters_in_numel",
)
"""Where that has its settings, in items."""


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
    parameters: list[Any] = [each for each in model.parameters() if zero.is_partitioned(each)]
    if not parameters:
        return None
    engine: Any = next((found for each in parameters if (found := getattr(each, OPTIMIZER, None))), None)
    device = parameters[0].device
    kept = [tensor for each in parameters for tensor in (each.ds_tensor, each.ds_secondary_tensor)]
    kept = [tensor for tensor in kept if tensor is not None]
    trained = [each.ds_tensor for each in parameters if each.requires_grad]
    gradients, reductions = trained, Reductions()
    if engine is not None:
        trained = engine.fp32_partitioned_groups_flat
        gradients = [engine.grad_partitions_flat_buffer]
        reductions = _find_reductions(parameters, blocks, engine)
    masters = [each for each in trained if each.device.type == device.type]
    updated = [each.nbytes for each in masters]
    storages = _storages_of(device, (*kept, *masters, *gradients))
    if engine is None:  # parts of gradients are not there yet
        storages += sum(updated)
    return ZeroMemory(
        tensors=frozenset(map(id, (*parameters, *kept))),
        held_bytes=storages + _whole_bytes(filter(_stays, parameters)) + reductions.bucket_bytes,
        trained_bytes=sum(updated),
        update_bytes=sum(updated) if engine is None else max(updated, default=0),
        gathered=_find_gathered(
            model, parameters, blocks, None if engine is None else engine.parameter_offload
        ),
        reductions=reductions,
    )


def _find_gathered(
    model: nn.Module, parameters: Sequence[Any], blocks: Sequence[nn.Module], offload: Any
) -> Gathered:
    """Return what is gathered by `offload`, None where it is not known yet."""
    of_blocks = [_kept_in(block) for block in blocks]
    inside = {id(each) for of_block in of_blocks for each in of_block}
    outside_bytes = _freed_bytes(each for each in parameters if id(each) not in inside)
    moved_bytes = max((_freed_bytes(_kept_in(each, recurse=False)) for each in model.modules()), default=0)
    needed = max(map(_freed_bytes, of_blocks), default=0)
    if offload is None:
        return Gathered(needed, outside_bytes, moved_bytes)
    prefetched, reused, living = (getattr(offload, name) for name in (PREFETCHED, REUSED, LIVING))
    distance = staying = 0
    for of_block in reversed(of_blocks):
        if distance < reused:  # before it is read again in backward
            staying += _freed_bytes(of_block)
        distance += 2 * sum(each.ds_numel for each in of_block)
    needed = max(needed, staying)
    if not prefetched:
        return Gathered(needed, outside_bytes, moved_bytes)
    size = max(each.element_size() for each in parameters)
    freed = [each for each in parameters if id(each) in inside and not _stays(each)]
    largest = max(
        (_whole_bytes([each]) for each in freed), default=0
    )  # a bucket is closed when it is overfull
    early = min(_freed_bytes(parameters), living * size)
    whole = max(needed, early)
    return Gathered(
        whole,
        max(needed + outside_bytes - whole, 0),
        moved_bytes,
        min(_whole_bytes(freed), prefetched * size + largest),
        ahead_in_backward=staying < _whole_bytes(freed),
    )


def _find_reductions(parameters: Sequence[Any], blocks: Sequence[nn.Module], engine: Any) -> Reductions:
    trained = [each for each in parameters if each.requires_grad]
    total = sum(each.ds_numel for each in trained)
    inside = sum(each.ds_numel for block in blocks for each in _kept_in(block) if each.requires_grad)
    largest = max(trained, key=lambda each: each.ds_numel)
    size, items = engine.reduce_bucket_size, [dtype.itemsize for dtype in engine.ipg_buckets]
    copied = min(max(size, largest.ds_numel), total) * max(items)
    alone = _whole_bytes([largest]) if largest.ds_numel > size else 0  # it waits where backward left it
    bucket = size if engine.contiguous_gradients else min(size, total)
    return Reductions(bucket * sum(items), copied + alone, total > size, total - inside > size)


def _kept_in(module: nn.Module, *, recurse: bool = True) -> list[Any]:
    return [each for each in module.parameters(recurse=recurse) if zero.is_partitioned(each)]


def _freed_bytes(parameters: Iterable[Any]) -> int:
    """Return what those of `parameters` take while they are gathered that are freed again."""
    return _whole_bytes(each for each in parameters if not _stays(each))


def _stays(parameter: Any) -> bool:
    return parameter.ds_persist


def _whole_bytes(parameters: Iterable[Any]) -> int:
    return sum(each.ds_numel * each.element_size() for each in parameters)


def _storages_of(device: torch.device, tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages of `tensors` on `device`: some of them may be parts of one."""
    storages = [each.untyped_storage() for each in tensors if each.device.type == device.type]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
