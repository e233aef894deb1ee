"""Tiny models and batches on the device of this rank, the engines around them, and what is read of both."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

import fxopt
from fxopt.capture.installation import find_installation

ON_GPU = os.environ["FXOPT_TEST_DEVICE"] == "cuda"
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if ON_GPU else torch.device("cpu")
TINY = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=128,
    max_position_embeddings=64,
)
IGNORED = -100


def make_model(arch: str, lora: bool = False, storage: str = "", **overrides: Any) -> Any:
    """Return a tiny model in training mode, the same weights on every rank.

    With `lora` on a frozen base, on three layers of each block; where a dtype is named as `storage`, the base is in
    four bits packed into that.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(arch, **{**TINY, **overrides})
    model = AutoModelForCausalLM.from_config(config)
    if storage:
        quantize(model, getattr(torch, storage))
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model.train().to(DEVICE)


def quantize(model: Any, storage: torch.dtype) -> None:
    """Put NF4 layers of bitsandbytes in the place of the linear layers in the blocks, packed into `storage`."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for block in find_blocks(model):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                sizes = layer.in_features, layer.out_features
                new = Linear4bit(*sizes, False, torch.float32, quant_type="nf4", quant_storage=storage)
                options = {"quant_type": "nf4", "quant_storage": storage, "module": new}
                new.weight = Params4bit(layer.weight.data, requires_grad=False, **options)
                parent, _, attribute = name.rpartition(".")
                setattr(block.get_submodule(parent), attribute, new.to(DEVICE))
    model.is_loaded_in_4bit = True  # peft adds four-bit adapters to a model that says so


def make_batch(seed: int, rows: int, length: int, ignored: bool = False) -> dict[str, torch.Tensor]:
    """Return ids and labels; some labels are ignored, or all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, : length // 3] = IGNORED
    if ignored:
        labels[:] = IGNORED
    return {"input_ids": ids.to(DEVICE), "labels": labels.to(DEVICE)}


def num_items(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Return the number of labels that count, over all `batches`."""
    return torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches]).sum()


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a causal LM, wrapped by adapters or not."""
    return next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1)


def shard(
    model: Any,
    carved: bool = False,
    half: bool = False,
    offloaded: bool = False,
    hybrid: bool = False,
    **options: Any,
) -> Any:
    """Shard `model` per block and as a whole; `carved` as accelerate does, embedding and tail in their own groups."""
    if hybrid:
        sizes = 2, dist.get_world_size() // 2
        options["mesh"] = init_device_mesh(DEVICE.type, sizes, mesh_dim_names=("replicate", "shard"))
    if offloaded:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=ON_GPU)
    if half:
        dtype = torch.bfloat16
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype, output_dtype=dtype)
    blocks = find_blocks(model)
    for block in blocks:
        fully_shard(block, **options)
    if carved:
        inner, head = find_around(model, blocks), model.get_output_embeddings()
        norm = next(
            m for m in reversed(list(inner.children())) if next(m.parameters(recurse=False), None) is not None
        )
        table = model.get_input_embeddings()
        if table.weight is head.weight:
            fully_shard([table, norm, head], **options)
        else:
            fully_shard(table, **options)
            fully_shard([norm, head], **{"reshard_after_forward": False, **options})
    return fully_shard(model, **options)


def find_around(model: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    """Return the module that holds the list of `blocks`."""
    return next(m for m in model.modules() if any(blocks[0] in list(c.children()) for c in m.children()))


def wrap(engine: str, model: Any, **options: Any) -> Any:
    """Return `model` under `engine`."""
    if engine == "ddp":
        return DistributedDataParallel(model, **options)
    if engine == "none":
        return model
    assert engine == "fsdp2", engine
    return shard(model, **options)


def inside(model: Any) -> Any:
    """Return the model that an engine wraps."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def build(engine: str, order: str, model: Any, options: dict[str, Any], verify: str = "off") -> Any:
    """Return `model` under `engine`, optimized before or after, or stock."""
    if order == "before":
        model = fxopt.optimize(model, verify=verify)
    model = wrap(engine, model, **options)
    if order == "after":
        wrapped = fxopt.optimize(model, verify=verify)
        assert wrapped is model
    return model


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the whole gradients of the parameters that have one."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in inside(model).named_parameters():
        if parameter.grad is not None:
            found[name] = _copy_whole(parameter.grad)
    return found


def whole_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the parameters, whole, of a model under any engine or none."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter]):
                found[name] = _copy_whole(parameter)
        else:
            found[name] = _copy_whole(parameter)
    return found


def _copy_whole(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True)


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest relative error of a gradient; the same parameters must have one."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    norms = [float((found[n] - expected[n]).norm() / expected[n].norm().clamp_min(1e-12)) for n in expected]
    return math.inf if any(map(math.isnan, norms)) else max(norms)


def report_of(model: Any) -> dict[str, Any]:
    """Return what an optimized model did: fallbacks with reasons, sites by status and pattern."""
    installation = find_installation(model)
    assert installation is not None, "not optimized"
    report = fxopt.explain(inside(model))
    sites: dict[str, int] = {}
    for site in report.sites:
        key = site.pattern if site.status == "rewritten" else f"{site.status} {site.pattern}: {site.reason}"
        sites[key] = sites.get(key, 0) + site.count
    fallbacks = {f"{region}: {why}": n for (region, why), n in installation.ledger.fallbacks.items()}
    return {"fallbacks": fallbacks, "sites": sites, "notes": list(installation.ledger.notes)}
