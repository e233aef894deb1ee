"""The gates before a kernel is timed, on a CPU, where nothing is; and the scripts of whole runs, tiny."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
import time
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


@pytest.mark.slow
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


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script of `benchmarks/`, as one run from the project's root."""
    pytest.importorskip("datasets")
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_texts_have_lengths_of_their_own_within_bounds(script: Any) -> None:
    lengths = script("lengths")
    topics = [[[1] * 30, [2] * 50, [3] * 200], [[4] * 10], [[5] * 90, [6] * 4]]
    texts = lengths.draw_texts(topics, 50, 128, seed=0)
    assert len(texts) == 50
    assert {len(text) for text in texts} == {94, 128}
    assert texts == lengths.draw_texts(topics, 50, 128, seed=0)
    assert texts != lengths.draw_texts(topics, 50, 128, seed=1)


def test_what_a_stack_that_fails_said_is_part_of_the_result(script: Any) -> None:
    processes, lengths = script("processes"), script("lengths")
    (row,) = processes.run_each("benchmarks.no_such_script", ["hf"], [])
    assert row["stack"] == "hf"
    assert "No module named" in row["error"]
    good = {"stack": "fxopt", "seconds": 2.0, "tokens_per_second": 9.0, "first_step_s": 1.0, "peak_gib": 1.0}
    text = lengths.render(
        [row, good | {"recompiles": 3}, good | {"stack": "diy", "seconds": 4.0, "recompiles": 0}]
    )
    assert "hf           failed: " in text
    assert text.splitlines()[-1].endswith("0.50")


def test_learning_is_judged_by_loss_and_by_distance(script: Any) -> None:
    runs = {
        "stock": [[3.0, 2.0], [3.0, 2.2]],
        "fxopt": [[3.0, 2.1], [3.0, 2.2]],
        "fp32": [[3.0, 2.1], [3.0, 2.1]],
    }
    summary = script("learning").summarize(runs)
    assert summary["loss"]["stock"] == [2.0, 2.2]
    assert summary["no_worse_than_stocks_worst"]
    assert summary["as_close_to_fp32"]
    runs["fxopt"] = [[3.0, 2.6], [3.0, 2.2]]
    summary = script("learning").summarize(runs)
    assert summary["above_stocks_worst"] == pytest.approx(0.4)
    assert not summary["no_worse_than_stocks_worst"]
    assert not summary["as_close_to_fp32"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_learning_runs_tiny(script: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    work = ["--size", "tiny", "--steps", "4", "--seeds", "1", "--length", "32", "--rate", "1e-2"]
    files = ["--out", str(tmp_path / "found.json"), "--plot", str(tmp_path / "found.png")]
    script("learning").main([*work, *files])
    found = json.loads((tmp_path / "found.json").read_text())
    assert (tmp_path / "found.png").stat().st_size > 10_000
    for ours, stock, exact in zip(
        *(found["runs"][mode][0] for mode in ("fxopt", "stock", "fp32")), strict=True
    ):
        assert ours == pytest.approx(exact, rel=1e-3)
        assert stock == pytest.approx(exact, rel=1e-3)
    assert found["work"]["steps"] == len(found["runs"]["fp32"][0]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("lengths", marks=pytest.mark.exhaustive), "sft"])
def test_stacks_run_tiny_in_processes_of_their_own_and_see_the_same(
    name: str, script: Any, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("trl")
    out = tmp_path / "found.json"
    options = {"lengths": ["--most", "96"], "sft": ["--length", "96", "--natural"]}[name]
    work = ["--size", "tiny", "--stacks", "hf,fxopt", "--steps", "3", *options, "--out", str(out)]
    assert script(name).main(work) == 0
    hf, ours = json.loads(out.read_text())
    assert (hf["stack"], ours["stack"]) == ("hf", "fxopt")
    assert len(hf["losses"]) == 3
    assert ours["losses"] == pytest.approx(hf["losses"], rel=2e-3)
    assert all(row["peak_gib"] > 0 and row["first_step_s"] > 0 for row in (hf, ours))
    if name == "lengths":
        assert ours["fallbacks"] == 0
        assert hf["recompiles"] == 0


@pytest.mark.slow
def test_mixtures_are_measured_against_stock_on_the_same_weights(script: Any, tmp_path: Path) -> None:
    out = tmp_path / "experts.json"
    sizes = ["--tokens", "40", "--divide", "64", "--steps", "1"]
    assert script("experts").main([*sizes, "--contestants", "grouped_mm,fxopt", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["shape"] for row in rows] == ["mixtral", "deepseek_v3"]
    for row in rows:
        assert row["fxopt"]["experts"] == ["rewritten: experts"]
        assert row["fxopt"]["fallbacks"] == 0
        assert 0 < row["fxopt"]["difference"] < 0.02, "as two roundings to bfloat16 differ"
        assert row["grouped_mm"]["difference"] == 0


@pytest.mark.slow
def test_types_that_fail_are_rows_among_those_that_are_timed(script: Any, tmp_path: Path) -> None:
    out = tmp_path / "architectures.json"
    given = ["--tiny", "--steps", "1", "--types", "gpt2,no_such_type", "--most", "1000", "--out", str(out)]
    assert script("architectures").main(given) == 1
    found = json.loads(out.read_text())
    assert found["failed"] == ["no_such_type"]
    assert found["slower"] == []
    (row,) = [row for row in found["rows"] if row["type"] == "gpt2"]
    assert row["fallbacks"] == {}
    assert set(row["regions"].values()) == {"captured"}
    assert row["loss_fxopt"] == pytest.approx(row["loss_stock"], rel=1e-3)
    assert row["ratio"] == pytest.approx(row["fxopt_ms"] / row["stock_ms"], rel=0.01)


CHILD = """
import sys, time
sys.path.insert(0, {root!r})
from benchmarks.turns import Turn
turn = Turn()
print("goes with the errors")
for _ in range(3):
    with turn:
        begun = time.time()
        time.sleep(0.05)
        open({out!r}, "a").write(f"{{begun}} {{time.time()}}\\n")
"""


def test_processes_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    turns = importlib.import_module("benchmarks.turns")
    code, told = CHILD.format(root=str(ROOT), out=str(tmp_path / "turns")), []
    logs = [tmp_path / str(number) for number in range(3)]
    commands = [[sys.executable, "-c", code]] * 3
    turns.run_in_turns(commands, logs, at_once=2, until=time.time() + 60, tell=told.append)
    spans = sorted(tuple(map(float, line.split())) for line in (tmp_path / "turns").read_text().splitlines())
    assert len(spans) == 9
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert [log.read_text() for log in logs] == ["goes with the errors\n"] * 3
    assert len(told) == 3
    assert all(text.endswith("ended with 0") for text in told)
