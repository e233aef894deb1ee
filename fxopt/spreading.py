"""What an engine that shards a model's parameters adds to a step, as the planner takes it."""

from __future__ import annotations

import dataclasses

from torch import nn

from fxopt.capture.deepspeed_private import MovedError
from fxopt.capture.spread import NO_GROUP, Group, find_groups
from fxopt.capture.zero_memory import ZeroMemory, find_memory
from fxopt.capture.zero_partitions import Backward, PartitionMemory, find_partitions
from fxopt.remat.step import NOT_SPREAD, Beside, Spread


@dataclasses.dataclass(frozen=True)
class Sharded:
    """What lies on this rank of parameters that an engine shards, in bytes, and what it adds to a step.

    `tensors` are the ids of what it stands for. `held_bytes` live all the time, `trained_bytes` is each state
    of the optimizer, `update_bytes` of gradients are there at its step. `uncounted` says why nothing is known, if so.
    """

    tensors: frozenset[int] = frozenset()
    held_bytes: int = 0
    trained_bytes: int = 0
    update_bytes: int = 0
    spread: Spread = NOT_SPREAD
    uncounted: str = ""


def find_sharded(model: nn.Module, paths: tuple[str, ...]) -> Sharded:
    """Return what an engine makes of the parameters of `model`, whose blocks are at `paths`."""
    blocks = [model.get_submodule(path) for path in paths]
    try:
        memory, partitions = find_memory(model, blocks), find_partitions(model, blocks)
    except MovedError as error:
        reason = str(error).replace("\n", "; ")
        return Sharded(
            uncounted=f"plans count parameters as they lie, not what their engine makes of them: {reason}"
        )
    if memory is not None:
        return _under_zero_3(memory, len(blocks))
    return _under_fsdp(find_groups(model), blocks) if partitions is None else _under_zero_1_and_2(partitions)


def _under_fsdp(groups: dict[nn.Module, Group], blocks: list[nn.Module]) -> Sharded:
    """Return it for FSDP2; groups that stay gathered are counted all the time.

    While a block runs forward, what was received and the parameters copied out of it both live; backward, the
    parameters, those of the next block on their way, and the buffer of the reduction before.
    """
    of_blocks = [groups.get(module, NO_GROUP) for module in blocks]
    others = [group for module, group in groups.items() if module not in blocks]
    trained = sum(group.trained_bytes for group in groups.values())
    spread = Spread(
        blocks=tuple(
            Beside(
                forward=group.whole_bytes * (1 if group.stays else 2),
                backward=group.whole_bytes * (0 if group.stays else 2) + group.reduced_bytes,
                num_ranks=group.num_ranks,
            )
            for group in of_blocks
        ),
        whole_bytes=sum(group.whole_bytes for group in (*others, *(g for g in of_blocks if g.stays))),
        reduced_bytes=sum(group.reduced_bytes for group in others),
    )
    return Sharded(
        frozenset(id(tensor) for group in groups.values() for tensor in group.exposed),
        sum(group.kept_bytes for group in groups.values()),
        trained,
        trained,
        spread,
    )


def _under_zero_3(memory: ZeroMemory, num_blocks: int) -> Sharded:
    """Return it for ZeRO-3: the most that is gathered is counted all the time, for blocks that are alike.

    Gradients are in buffers that always live.
    """
    gathered, reductions = memory.gathered, memory.reductions
    ahead = gathered.ahead_bytes if gathered.ahead_in_backward else 0
    block = Beside(
        forward=gathered.outside_bytes + gathered.ahead_bytes,
        backward=ahead,
        moved_bytes=gathered.moved_bytes,
        reduced_bytes=reductions.bytes if reductions.within_blocks else 0,
        holds_gradients=True,
    )
    tail = dataclasses.replace(
        block,
        forward=gathered.outside_bytes + ahead,
        backward=gathered.outside_bytes + ahead,
        reduced_bytes=reductions.bytes if reductions.behind_blocks else 0,
    )
    spread = Spread(
        blocks=(block,) * num_blocks,
        tail=tail,
        whole_bytes=gathered.whole_bytes,
        reduced_bytes=reductions.bytes + gathered.outside_bytes,
    )
    return Sharded(memory.tensors, memory.held_bytes, memory.trained_bytes, memory.update_bytes, spread)


def _under_zero_1_and_2(memory: PartitionMemory) -> Sharded:
    """Return it for ZeRO-1 and ZeRO-2: parameters are whole all the time, what moves are gradients."""

    def beside(backward: Backward, *, holds_gradients: bool) -> Beside:
        return Beside(
            backward=backward.bytes, reduced_bytes=backward.reduced_bytes, holds_gradients=holds_gradients
        )

    spread = Spread(
        blocks=tuple(beside(block, holds_gradients=memory.holds_gradients) for block in memory.blocks),
        tail=beside(memory.tail, holds_gradients=memory.holds_gradients and not memory.is_tied),
        reduced_bytes=memory.end_bytes,
    )
    return Sharded(memory.tensors, memory.held_bytes, memory.trained_bytes, memory.update_bytes, spread)
