"""The gates before a kernel is timed: its tests, and its result against the reference; on a CPU, nothing is timed."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt.kernels.glu import glu

ROOT = Path(__file__).parent.parent


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return benchmarks/kernels.py, which is no part of the package."""
    pytest.importorskip("triton", reason="kernels are timed with Triton's own timer")
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.kernels")


def make_case(kernels: Any, error: float, seen: list[int]) -> Any:
    def make(rows: int) -> list[torch.Tensor]:
        seen.append(rows)
        return [torch.randn(rows, 24).bfloat16().requires_grad_() for _ in range(2)]

    def ours(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        y = glu(gate, up, act="silu")
        return y if y.dtype is torch.float64 else y * (1 + error)

    contestants = {"fxopt": ours, "eager": lambda gate, up: F.silu(gate) * up}
    return kernels.Case("glu", "40 x 24", make, contestants, rows=40)


def test_an_op_that_agrees_with_its_reference_is_timed(kernels: Any) -> None:
    seen: list[int] = []
    assert kernels.find_disagreement(make_case(kernels, 0.0, seen)) is None
    assert seen == [40], "checked at the size that is timed"


def test_an_op_that_does_not_agree_is_refused_with_figures(kernels: Any) -> None:
    found = kernels.find_disagreement(make_case(kernels, 0.05, []))
    assert re.fullmatch(r"output 0: error [45]\.\d+e-02, eager has 2\.\d+e-03", found), found


def test_red_or_missing_tests_refuse(kernels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(kernels, "ROOT", tmp_path)
    for name, condition in (("good", True), ("bad", False)):
        text = f"import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    assert {condition}\n"
        (folder / f"test_{name}.py").write_text(text)
    (folder / "test_none.py").write_text("def test_without_a_gpu():\n    pass\n")
    assert kernels.find_red_tests("good") is None
    assert "its tests are red (exit code 1)" in kernels.find_red_tests("bad")
    assert "its tests are red (exit code 5)" in kernels.find_red_tests("none"), "no test was run"
    assert kernels.find_red_tests("gone") == (
        "there is no tests/kernels/test_gone.py, expected the tests of its kernels"
    )


@pytest.mark.parametrize("place", range(8))
def test_contestants_of_attention_compute_the_same(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: no peer is compiled, and none that only a GPU has is called."""
    monkeypatch.syspath_prepend(str(ROOT))
    cases = importlib.import_module("benchmarks.cases.attention")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for made in (cases.make_mask, cases.make_added, cases.make_blocks):
        made.cache_clear()
    monkeypatch.setattr(cases, "WINDOW", 8)
    assert len(cases.FORMS) == 8
    case = cases.make_cases()[place]
    torch.manual_seed(0)
    tensors = [x.detach().float().requires_grad_() for x in case.make(24)]
    results = {}
    for name, function in case.contestants.items():
        if name == "flex":  # forward alone: on a CPU it has no backward
            results[name] = [function(*(x.detach() for x in tensors))]
        elif name not in ("cudnn", "flash", "efficient"):
            y = function(*tensors)
            results[name] = [y.detach(), *torch.autograd.grad(y, tensors, torch.ones_like(y).cumsum(-1))]
    assert {"fxopt", "eager", "flex"} < set(results), "with sdpa or compile"
    for name, found in results.items():
        for value, expected in zip(found, results["eager"], strict=name != "flex"):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4, msg=f"{name}, {case.size}")
