"""What fxopt knows of DeepSpeed."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from cases.models import make_batch, make_model, report_of
from cases.zero import initialize
from torch import nn

import fxopt
from fxopt.capture import deepspeed_private as private
from fxopt.capture import engines, torch_tensors, zero


def deepspeed_privates(stage: int) -> dict[str, bool]:
    """Return what fxopt knows of a stage of ZeRO, by name, and whether it is so."""
    world = dist.get_world_size()
    model = make_model("llama")
    items = {name: parameter.numel() for name, parameter in model.named_parameters()}
    stock = nn.functional.linear
    engine = initialize(model, stage)
    parameters = dict(model.named_parameters())
    found = {
        "tested": sys.modules["deepspeed"].__version__ == private.TESTED,
        "group": dist.get_process_group_ranks(zero.group_of(model)) == list(range(world)),
    }
    loss = engine(**make_batch(0, 2, 12)).loss
    if stage == 3:
        of_3 = private.find_stage_3(parameters.values())
        assert of_3 is not None
        gathering = zero.find_gatherings([model.lm_head])[0]
        found |= {
            "kept": all(map(private.is_partitioned, parameters.values())),
            "items": {name: private.num_items(p) for name, p in parameters.items()} == items,
            "shapes": tuple(zero.whole_shape(model.lm_head.weight)) == (128, 32),
            "stays": not any(map(private.stays_gathered, parameters.values())),
            "shards": all(private.shard_of(p).numel() * world >= p.ds_numel for p in parameters.values()),
            "second shards": all(private.second_shard_of(p) is None for p in parameters.values()),
            "masters": sum(m.numel() for m in of_3.masters) * world >= sum(items.values()),
            "gradients": of_3.gradients.numel() * world >= sum(items.values()),
            "bucket": (of_3.bucket_items, of_3.bucket_dtypes) == (BUCKET, (torch.float32,)),
            "settings": of_3.prefetched > 0 and of_3.reused > 0 and of_3.living > 0,
            "hooks": len(gathering.before) == len(gathering.after) == 2 and gathering.has_parameters,
            "linear": private.is_linear(nn.functional.linear) or nn.functional.linear is stock,
            "modules": all(n in sys.modules for n in (private.MODULE_HOOKS, private.STAGE_3, private.LINEAR)),
        }
    else:
        of_2 = private.find_stages_1_and_2(parameters.values())
        assert of_2 is not None
        (group,) = of_2.groups
        found |= {
            "linked": all(map(private.is_under_stages_1_and_2, parameters.values())),
            "hooks": all(torch_tensors.gradient_hooks(p) for p in parameters.values()),
            "whole": sum(items.values()) <= group.whole.numel() == group.part_items * world,
            "master": group.master.numel() == group.part_items,
            "offsets": all(
                parameter.data_ptr() == group.whole.data_ptr() + offset * group.whole.element_size()
                for parameter, offset in zip(group.parameters, group.offsets, strict=True)
            ),
            "dtypes": of_2.dtype == of_2.sum_dtype == of_2.bucket_dtypes[0] == torch.float32,
            "bucket": of_2.bucket_items == BUCKET,
            "settings": (of_2.is_contiguous, of_2.keeps_parts, of_2.overlaps, of_2.scatters, of_2.offloads)
            == (True, stage == 2, False, True, False),
            "micro-batches": of_2.micro_batches == 1,
            "modules": private.STAGES_1_AND_2 in sys.modules,
        }
    hooks = list((loss._backward_hooks or {}).values())
    found["output hooks"] = bool(hooks) and all(map(engines.is_engine_hook, hooks))
    engine.backward(loss)
    return found


BUCKET = 500_000_000


def deepspeed_moved(stage: int) -> dict[str, Any]:
    """Train a planned step where DeepSpeed has no such setting as fxopt reads; return what the report says."""
    read = private.read
    model = fxopt.optimize(make_model("llama"), memory_budget="min", verify="off")
    engine = initialize(model, stage, reduce_bucket_size=400_000)
    private.read = lambda holder, name: read(holder, name.replace("reduce_bucket_size", "bucket_moved"))
    try:
        engine.backward(engine(**make_batch(0, 2, 12)).loss)
    finally:
        private.read = read
    report = fxopt.explain(model)
    return {**report_of(model), "plans": len(report.plans), "notes": list(report.notes)}
