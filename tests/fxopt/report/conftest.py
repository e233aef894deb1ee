"""Reports of small models, each explained once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.coverage.shrink import tiny_config
from fxopt.demo.models import build_meta_model
from fxopt.report.records import Report

SHARED = {"report_of", "hostile"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one worker of pytest run the tests that share reports, so that each report is made once."""
    for item in items:
        if SHARED & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("reports"))


EVIL = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"&"


def evil(record: object) -> object:
    """Return a record whose every text is hostile."""
    if isinstance(record, str):
        return EVIL
    if isinstance(record, tuple):
        return tuple(map(evil, record))
    if isinstance(record, dict):
        return {f"{EVIL}{place}": evil(value) for place, value in enumerate(record.values())}
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        kept = {"status", "kind", "oracle_dtype"}
        values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        return dataclasses.replace(record, **{k: v if k in kept else evil(v) for k, v in values.items()})
    return record


def four_bit_with_adapters() -> nn.Module:
    """Return a tiny llama whose layers are in four bits, with adapters on all of them."""
    library: Any = pytest.importorskip("bitsandbytes").nn
    peft: Any = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(tiny_config("llama"))
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            new = library.Linear4bit(
                layer.in_features, layer.out_features, False, compute_dtype=torch.float32
            )
            new.weight = library.Params4bit(
                layer.weight.data, requires_grad=False, module=new, quant_type="nf4", compress_statistics=True
            )
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new.to("cpu"))
    model.is_loaded_in_4bit = True
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))


@functools.cache
def explained(name: str) -> Report:
    model = four_bit_with_adapters() if name == "qlora" else build_meta_model(tiny_config(name))
    if "moe" in name:
        # Torch 2.11 has no grouped product of float32 on the meta device: there mixtures run in bfloat16 alone.
        model = model.to(torch.bfloat16)
    return dataclasses.replace(fxopt.explain(model), plans=(fxopt.plan(model, "min"),)).measured()


@pytest.fixture(scope="session")
def report_of() -> Callable[[str], Report]:
    """Return a function that explains and plans a model type, "qlora" for one in four bits with adapters."""
    return explained


@pytest.fixture(scope="session")
def hostile() -> Report:
    """Return a report with a plan in which every text is a piece of HTML that would run a script."""
    found = evil(explained("llama"))
    assert isinstance(found, Report)
    return found
