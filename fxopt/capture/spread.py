"""What an engine makes of the memory that a model's parameters need on one rank, in bytes.

FSDP2 keeps a shard of each parameter, gathers those of one group for its forward and again for its backward, and
reduces their gradients from a buffer. DistributedDataParallel keeps all, and reduces gradients in buckets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from fxopt.capture import torch_distributed
from fxopt.capture.modules import walk


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that are gathered together.

    `kept_bytes` of shards stay on the device, `trained_bytes` of them with a gradient; gathered they are
    `whole_bytes`, their gradients `reduced_bytes` before they are reduced.
    """

    exposed: tuple[torch.Tensor, ...] = ()
    kept_bytes: int = 0
    trained_bytes: int = 0
    whole_bytes: int = 0
    reduced_bytes: int = 0
    num_ranks: int = 1
    stays: bool = False


NO_GROUP = Group()


def find_groups(model: nn.Module) -> dict[nn.Module, Group]:
    """Return what FSDP2 gathers in `model`, by the first module that it is gathered for."""
    found: dict[nn.Module, Group] = {}
    seen: set[int] = set()
    for module in walk(model):
        state = torch_distributed.fsdp_state_of(module)
        if state is not None and id(state) not in seen:
            seen.add(id(state))
            found[module] = _read(state)
    return found


def _read(state: object) -> Group:
    policy, groups = torch_distributed.policy_of(state), torch_distributed.groups_of(state)
    items = [item for group in groups for item in torch_distributed.sharded_in(group)]
    if not items:
        return NO_GROUP
    dtypes = [policy.param_dtype or item.shard.dtype for item in items]
    pairs = list(zip(items, dtypes, strict=True))
    trained = [(item, dtype) for item, dtype in pairs if item.exposed.requires_grad]
    return Group(
        exposed=tuple(item.exposed for item in items),
        kept_bytes=sum(item.shard.nbytes for item in items if not item.waits_on_host),
        trained_bytes=sum(item.shard.nbytes for item, _ in trained if not item.waits_on_host),
        whole_bytes=sum(item.num_items * dtype.itemsize for item, dtype in pairs),
        reduced_bytes=sum(
            item.num_items * (policy.reduce_dtype or dtype).itemsize for item, dtype in trained
        ),
        num_ranks=dist.get_world_size(torch_distributed.group_of(state)),
        stays=any(map(torch_distributed.stays_gathered, groups)),
    )


def find_bucket_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return what DistributedDataParallel, where it runs the model right now, reduces gradients of `parameters` in."""
    engine = torch_distributed.active_ddp()
    if engine is None or not torch_distributed.has_buckets_of_its_own(engine):
        return 0
    return sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)


def device_of(model: nn.Module) -> torch.device:
    """Return the device that `model` computes on: shards of its parameters may wait on the host."""
    state = torch_distributed.fsdp_state_of(model)
    if state is not None:
        return torch_distributed.device_of(state)
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
