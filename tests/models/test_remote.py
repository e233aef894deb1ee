"""Models whose code comes with their weights: spellings of their own, optimized like any other.

Each file of `remote/` is saved beside a config that names its classes, and loaded as `trust_remote_code` does.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

import fxopt

FOLDER = Path(__file__).parent / "remote"
CLASSES = {
    "heron": ("HeronConfig", "HeronForWriting"),
    "marten": ("MartenConfig", "MartenForText"),
    "sedge": ("SedgeConfig", "SedgeForGrowth"),
    "dunlin": ("DunlinConfig", "DunlinForCalls"),
}
SITES = {
    "heron": {"rms_norm": 3 * 4 + 1, "rope": 3 * 2, "attention": 3, "glu": 3, "linear_cross_entropy": 1},
    "marten": {"layer_norm": 3 + 1, "rope": 3 * 2, "attention": 3, "glu": 3, "linear_cross_entropy": 1},
    "dunlin": {
        "rms_norm": 2 * 2 + 1,
        "rope": 2 * 2,
        "attention": 2,
        "glu": 2,
        "route": 2,
        "experts": 2,
        "linear_cross_entropy": 1,
    },
    "sedge": {"rms_norm": 4 * 2 + 2 + 1, "attention": 2, "glu": 4 * 4, "linear_cross_entropy": 1},
}
"""Counted by hand in the files: per layer, and what stands after the last one."""


SHAPES = ((2, 12), (3, 9))
"""The second is unseen at the first capture; a capture for any size takes most of a test's time."""


@pytest.fixture
def twins(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Return a model optimized, and it stock."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(FOLDER / f"{name}.py", folder)
    config_class, model_class = CLASSES[name]
    auto_map = {"AutoConfig": f"{name}.{config_class}", "AutoModelForCausalLM": f"{name}.{model_class}"}
    (folder / "config.json").write_text(json.dumps({"model_type": name, "auto_map": auto_map}))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(config, trust_remote_code=True).train()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return fxopt.optimize(copy.deepcopy(stock)), stock


OTHERS = [name for name in SITES if name != "heron"]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        pytest.param("heron", SHAPES[:1], id="heron, one size"),
        pytest.param("heron", SHAPES, id="heron", marks=pytest.mark.slow),
        *(pytest.param(name, SHAPES[:1], id=f"{name}, one size", marks=pytest.mark.slow) for name in OTHERS),
        *(pytest.param(name, SHAPES, id=name, marks=pytest.mark.exhaustive) for name in OTHERS),
    ],
)
def test_remote_code_is_rewritten_whole_and_trains_as_stock(
    name: str, shapes: Any, twins: tuple[Any, Any]
) -> None:
    model, stock = twins
    for step, shape in enumerate(shapes):
        ids = torch.randint(256, shape, generator=torch.Generator().manual_seed(step))
        losses: list[torch.Tensor] = []
        for each in (model, stock):
            each.zero_grad()
            losses.append(each(input_ids=ids, labels=ids)["loss"])
            losses[-1].backward()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        for (path, mine), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), path
            if theirs.grad is not None:
                error = (mine.grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-6)
                assert error < 1e-4, f"{path}: {error:.1e}"
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert [region.status for region in report.regions] == ["captured", "captured"]
    assert [site for site in report.sites if site.status != "rewritten"] == []
    counts = {kind: sum(s.count for s in report.sites if s.pattern == kind) for kind in SITES[name]}
    assert counts == SITES[name]
    assert {site.pattern for site in report.sites} == set(SITES[name])
