"""What fxopt knows of torch's engines."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from cases.models import DEVICE
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fxopt.capture import torch_distributed as engines


def privates() -> dict[str, Any]:
    """What fxopt knows of torch's engines, each fact on a module sharded alone or in a group."""
    alone, first, second = (nn.Linear(4, 4, device=DEVICE) for _ in range(3))
    policy = MixedPrecisionPolicy(output_dtype=torch.float64)
    fully_shard(alone, mp_policy=policy)
    fully_shard([first, second])
    alone.register_forward_hook(lambda module, given, output: None)
    modules = (alone, first, second)
    hooks = [[*m._forward_pre_hooks.values(), *m._forward_hooks.values()] for m in modules]
    state = engines.fsdp_state_of(alone)
    before = engines.is_initialized(state)
    spread = [engines.is_dtensor(parameter) for parameter in (alone.weight, nn.Linear(4, 4).weight)]
    output = alone(torch.ones(2, 4, device=DEVICE))
    store = engines.shared_store("privates")
    store.set(f"{dist.get_rank()}", "1")
    ddp = DistributedDataParallel(nn.Linear(4, 4, device=DEVICE))
    inside_of: list[bool] = []
    ddp.module.register_forward_hook(lambda *_: inside_of.append(engines.active_ddp() is ddp))
    ddp(torch.ones(2, 4, device=DEVICE))
    looking = DistributedDataParallel(nn.Linear(4, 4, device=DEVICE), find_unused_parameters=True)
    sunk = looking(torch.ones(2, 4, device=DEVICE))
    return {
        "hooks": [[engines.is_fsdp_hook(hook) for hook in of_module] for of_module in hooks],
        "states": [
            engines.fsdp_state_of(first) is engines.fsdp_state_of(second),
            engines.fsdp_state_of(ddp) is None,
        ],
        "initialized": [before, engines.is_initialized(state)],
        "policy": [engines.policy_of(state) is policy, output.dtype is torch.float64],
        "ranks": engines.ranks_of(state) == list(range(dist.get_world_size())),
        "group": dist.get_process_group_ranks(engines.group_of(state)) == list(range(dist.get_world_size())),
        "store": all(store.get(str(rank)) == b"1" for rank in range(dist.get_world_size())),
        "ddp": [*inside_of, engines.active_ddp() is None],
        "sink": type(sunk.grad_fn).__name__ == f"{torch.nn.parallel.distributed._DDPSink.__name__}Backward",
        "dtensor": spread,
        "managed": [engines.is_managed(module) for module in (alone, first, ddp.module)],
        "base": torch.Tensor._base.__get__ == engines.READ_OF_BASE,
    }
