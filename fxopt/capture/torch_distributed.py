"""What is private of torch's data-parallel engines: whose hooks are FSDP2's, and the store that ranks share.

No engine is imported here: where nobody imported one, no module is under it.
`tests/distributed/test_torch_distributed.py` fails in plain words when a torch version moves one of these.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

FSDP = "torch.distributed.fsdp"
FSDP_STATE = "torch.distributed.fsdp._fully_shard._fsdp_state"
DDP = "torch.nn.parallel.distributed"
DTENSOR = "torch.distributed.tensor"
READ_OF_BASE: Any = torch.Tensor._base.__get__  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
"""FSDP2 looks at it on every output, to warn of views."""


def is_fsdp_hook(hook: Any) -> bool:
    """Return whether `hook` is one that `fully_shard` put on a module or an output, for one module or a group."""
    engine = sys.modules.get(FSDP_STATE)
    while engine is not None and hook is not None:
        if isinstance(getattr(hook, "__self__", None), engine.FSDPState):
            return True
        hook = getattr(hook, "__wrapped__", None)
    return False


def fsdp_state_of(module: nn.Module) -> Any:
    """Return the state that `fully_shard` keeps of `module`, or None."""
    engine: Any = sys.modules.get(FSDP)
    if engine is None or not isinstance(module, engine.FSDPModule):
        return None
    state: Any = module
    return state._get_fsdp_state()


def is_managed(module: nn.Module) -> bool:
    """Return whether FSDP2 shards the parameters of `module`, with those of a module around it or alone."""
    return getattr(module, "_is_fsdp_managed_module", False)


def is_initialized(state: Any) -> bool:
    """Return whether the root that `state` belongs to has begun its first forward."""
    return state._is_root is not None


def policy_of(state: Any) -> Any:
    """Return the mixed precision policy of `state`."""
    return state._mp_policy


def is_dtensor(tensor: object) -> bool:
    """Return whether `tensor` is spread over ranks."""
    engine = sys.modules.get(DTENSOR)
    return engine is not None and isinstance(tensor, engine.DTensor)


def ddp_class() -> Any:
    """Return DistributedDataParallel, or None where nobody imported it."""
    engine = sys.modules.get(DDP)
    return None if engine is None else engine.DistributedDataParallel


def is_first_fsdp(module: nn.Module) -> bool:
    """Return whether `module` is a wrapper of the first FSDP."""
    engine: Any = sys.modules.get(FSDP)
    return engine is not None and isinstance(module, engine.FullyShardedDataParallel)


def active_ddp() -> Any:
    """Return the DistributedDataParallel whose forward runs right now, or None."""
    engine = ddp_class()
    return None if engine is None else engine._get_active_ddp_module()


def groups_of(state: Any) -> list[Any]:
    """Return the groups of parameters of `state`: those of one are gathered together."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch 2.11: one at most
        groups = [group for group in (state._fsdp_param_group,) if group is not None]
    return list(groups)


def group_of(state: Any) -> Any:
    """Return the process group over which `state` shards, or None where it holds no parameters."""
    groups = groups_of(state)
    return groups[0]._all_gather_process_group if groups else None


def ranks_of(state: Any) -> list[int]:
    """Return the ranks that train what `state` shards, replicas included; none where it holds no parameters."""
    groups = groups_of(state)
    return groups[0].mesh_info.mesh.mesh.flatten().tolist() if groups else []


@dataclasses.dataclass(frozen=True)
class Sharded:
    """One parameter that FSDP2 shards: what lies on this rank, and what it is while gathered."""

    exposed: torch.Tensor
    """What the module holds right now: the shard, or the gathered parameter."""
    shard: torch.Tensor
    num_items: int
    waits_on_host: bool


def sharded_in(group: Any) -> list[Sharded]:
    """Return the parameters of a group."""
    return [
        Sharded(
            getattr(item._module_info.module, item._module_info.param_name),
            item.sharded_param._local_tensor,
            item._orig_size.numel(),
            item.offload_to_cpu,
        )
        for item in group.fsdp_params
    ]


def stays_gathered(group: Any) -> bool:
    """Return whether a group gathered for its forward stays so until its backward."""
    return group.post_forward_mesh_info is None


def device_of(state: Any) -> torch.device:
    """Return where gathered parameters of `state` lie, while shards may wait on the host."""
    return state._device


def passes_on_outputs(frame: types.FrameType) -> bool:
    """Return whether `frame` runs code of DistributedDataParallel's, which may pass outputs through a function."""
    engine = sys.modules.get(DDP)
    return engine is not None and frame.f_globals is vars(engine)


def find_sink(frame: types.FrameType) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what the DistributedDataParallel that runs in `frame` does with each output that has a gradient."""
    engine: Any = sys.modules[DDP]
    around = weakref.ref(frame.f_locals["self"])
    return lambda output: engine._DDPSink.apply(around, output)[0]


def has_buckets_of_its_own(engine: Any) -> bool:
    """Return whether a DistributedDataParallel reduces copies of gradients, which are not views of its buckets."""
    return not engine.gradient_as_bucket_view


def num_local_ranks() -> int:
    """Return how many ranks share this machine: as their launcher says, else all that there are."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    if said.isdecimal() and int(said):
        return int(said)
    return num_ranks()


def num_ranks() -> int:
    """Return how many ranks there are in all, 1 without a process group."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def make_host_group(ranks: list[int]) -> Any:
    """Return a new process group of `ranks`, all of which call this, whose tensors are on the host."""
    timeout = shared_store("").timeout
    return torch.distributed.new_group(ranks, timeout, "gloo", use_local_synchronization=True)


def shared_store(prefix: str) -> Any:
    """Return the part at `prefix` of the default process group's store: keys and values that all ranks see."""
    import torch.distributed.distributed_c10d as c10d

    return c10d.PrefixStore(prefix, c10d._get_default_store())
