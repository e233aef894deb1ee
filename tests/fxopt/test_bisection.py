"""Bisecting: the rewrites that make a check fail, and what it leaves behind."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.bisection import load_script
from fxopt.cli import main


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(8), nn.RMSNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return self.last(x + self.down(F.silu(self.gate(h)) * self.up(h)))


def make_model() -> nn.Module:
    return nn.Sequential(Block(), Block())


def step(model: nn.Module) -> set[str]:
    """Run a training step and return the patterns that were rewritten in it."""
    model(torch.randn(2, 3, 8)).sum().backward()
    try:
        return {rewrite.pattern for rewrite in fxopt.explain(model).rewrites}
    except fxopt.FxoptError:  # no inputs for the stock model
        return set()


def quiet(line: str) -> None:
    assert line.startswith("fxopt bisect: run ")


@pytest.mark.parametrize(
    "guilty",
    [
        {"glu"},
        pytest.param({"glu", "rms_norm"}, marks=pytest.mark.slow),
        pytest.param({"layer_norm"}, marks=pytest.mark.exhaustive),
    ],
)
def test_the_culprits_are_found_and_none_can_be_left_out(guilty: set[str]) -> None:
    model = make_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def check(model: nn.Module) -> None:
        if guilty <= step(model):
            raise ValueError("planted")
        with torch.no_grad():
            next(model.parameters()).add_(1)

    found = fxopt.bisect(model, check, on_progress=quiet)
    assert {name.split()[0] for name in found.rewrites} == guilty
    assert len(found.rewrites) == len(guilty)
    assert found.failure.startswith("ValueError: planted (test_bisection.py:")
    assert all(map(torch.equal, before, model.parameters()))
    assert step(model) == set(), "the model is left stock"


class Apart(Block):
    """Its rewrites do not build on each other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return self.last(self.down(F.silu(self.gate(h)) * self.up(h)))


@pytest.mark.slow
def test_no_set_of_rewrites_is_tried_twice() -> None:
    lines: list[str] = []
    tried: list[frozenset[str]] = []

    def check(model: nn.Module) -> None:
        done = step(model)
        tried.append(frozenset(done))
        assert not {"glu", "rms_norm"} <= done

    found = fxopt.bisect(nn.Sequential(Apart(), Apart()), check, on_progress=lines.append)
    assert len(found.rewrites) == 2
    assert found.num_rewrites == 3
    assert len(lines) == found.num_runs - 1 == len(tried) - 1
    assert all(f" of {found.num_rewrites} rewrites" in line for line in lines[1:-1])
    assert lines[-1].endswith("the stock model again: the check holds")
    sets = [names for names in tried[1:] if names]
    assert len(set(sets)) == len(sets)


def test_a_check_that_holds_has_no_culprits() -> None:
    found = fxopt.bisect(make_model(), lambda model: bool(step(model)) or True, on_progress=quiet)
    assert found.rewrites == ()
    assert "holds" in str(found)


def test_an_optimized_model_is_optimized_again_afterwards() -> None:
    model = fxopt.optimize(make_model(), disable=("glu",))
    seen: list[set[str]] = []
    fxopt.bisect(model, lambda model: seen.append(step(model)), on_progress=quiet)
    assert seen[-1] == step(model)
    assert "rms_norm" in seen[-1]
    assert "glu" not in seen[-1]


def test_mistakes_are_told() -> None:
    with pytest.raises(
        fxopt.FxoptError, match=r"check: fails on the stock model, .*: it returned False\ngive"
    ):
        fxopt.bisect(make_model(), lambda model: False, on_progress=quiet)
    with pytest.raises(
        fxopt.FxoptError, match=r"fails on the stock model, .*: RuntimeError: Boolean value.*\ngive"
    ):
        fxopt.bisect(make_model(), lambda model: torch.ones(2), on_progress=quiet)
    with pytest.raises(fxopt.FxoptError, match=r"on the stock model, .*: SystemExit: 0 \(test_b.*\ngive"):
        fxopt.bisect(make_model(), lambda model: sys.exit(0), on_progress=quiet)
    with pytest.raises(fxopt.FxoptError, match=r"check: no rewrite was made while it ran, expected .*\nrun"):
        fxopt.bisect(make_model(), lambda model: None, on_progress=quiet)

    def check() -> None:
        """Take no model."""

    with pytest.raises(
        fxopt.FxoptError,
        match=r"check: cannot be called as check\(model\) at check \(test_b.*: too many.*\ngive",
    ):
        fxopt.bisect(make_model(), check, on_progress=quiet)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_a_check_that_fails_for_having_run_before_blames_nothing() -> None:
    runs: list[int] = []

    def check(model: nn.Module) -> None:
        step(model)
        runs.append(1)
        assert len(runs) == 1

    with pytest.raises(fxopt.FxoptError, match=r"check: held on the stock model at first and fails .*\ngive"):
        fxopt.bisect(make_model(), check, on_progress=quiet)


def test_a_script_is_bisected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, fxopt\nfrom torch import nn\n"
        "def model():\n    return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))\n"
        "def check(model):\n    model(torch.randn(2, 4)).sum().backward()\n"
        "    assert model._compiled_call_impl is None or not fxopt.explain(model).rewrites, 'rewritten'\n"
    )
    with pytest.raises(SystemExit) as exit_info:
        main(["bisect", str(script)])
    assert exit_info.value.code == 1
    printed = capsys.readouterr().out
    assert "1 rewrite makes the check fail" in printed
    assert re.search(r"layer_norm in \S.*: \S", printed), printed
    assert "()" not in printed, printed


def test_a_script_imports_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("beside_script", "beside_check"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text("from torch import nn\n")
    script = tmp_path / "script.py"
    script.write_text(
        "from beside_script import nn\n"
        "def model():\n    return nn.Linear(4, 4)\n"
        "def check(model):\n    from beside_check import nn\n    return isinstance(model, nn.Linear)\n"
    )
    model, check = load_script(script)
    assert check(model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise ValueError('no')", r"script.py:1: cannot be run: ValueError: no"),
        ("def f(:", r"script.py:1: cannot be run: SyntaxError: .*\nmend"),
        ("\0", r"script.py: cannot be run: SyntaxError: .*null bytes\nmend"),
        ("\nimport sys\nsys.exit(3)", r"script.py:3: cannot be run: SystemExit: 3\nmend"),
        (
            "def model():\n    raise KeyError('x')\ndef check(model): pass",
            r"script.py:2: cannot be run: KeyError: 'x'\nmend",
        ),
        ("model = 1", r"script.py: defines no `check`, expected .*\nsee"),
        ("def check(model): pass", r"script.py: defines no `model`, expected"),
    ],
)
def test_bad_scripts_are_told(tmp_path: Path, text: str, message: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(text)
    with pytest.raises(fxopt.FxoptError, match=message):
        load_script(script)
    with pytest.raises(fxopt.FxoptError, match="no such Python file"):
        load_script(tmp_path / "gone.py")
    other = tmp_path / "script.txt"
    other.write_text("model = check = 1")
    with pytest.raises(
        fxopt.FxoptError,
        match=r"script.txt: not a Python file, expected a name that ends in .py, got one that ends in .txt\nrename",
    ):
        load_script(other)


async def check_later(model: nn.Module) -> None:
    raise AssertionError("never awaited")


def check_in_steps(model: nn.Module) -> Any:
    yield model(torch.ones(1, 2))


def put_another_in(model: nn.Module) -> None:
    model.register_module("0", nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (
            check_later,
            "expected a function that runs when it is called, got one that returns a coroutine\nwrite",
        ),
        (
            check_in_steps,
            "expected a function that runs when it is called, got one that returns a generator\nwrite",
        ),
        (
            put_another_in,
            "puts other parameters into the model, expected the same .*, got a new 0.weight\ngive a check",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_a_check_that_would_hold_whatever_it_does_is_told(check: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(fxopt.FxoptError, match=message):
        fxopt.bisect(model, check, on_progress=lambda line: None)


def test_the_line_told_is_the_checks_own_and_not_one_of_torchs() -> None:
    def check(model: nn.Module) -> None:
        torch.testing.assert_close(model(torch.ones(1, 2)), torch.zeros(1, 2))

    line = check.__code__.co_firstlineno + 1
    with pytest.raises(fxopt.FxoptError, match=rf"AssertionError: .* \(test_bisection.py:{line}\)"):
        fxopt.bisect(nn.Linear(2, 2), check, on_progress=lambda text: None)
