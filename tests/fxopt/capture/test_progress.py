"""While a first step compiles, one line says what is compiled and at what stage."""

from __future__ import annotations

import io
import logging
import re

import pytest
import torch
from torch import nn

import fxopt
from fxopt.capture.progress import Progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def make_model() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))).train()


def train(model: nn.Module) -> None:
    model(torch.randn(2, 4)).sum().backward()


def test_each_stage_is_a_record_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fxopt")
    model = fxopt.optimize(make_model())
    train(model)
    lines = [re.sub(r"\d+\.\d s", "0 s", line) for line in caplog.messages if line.startswith("fxopt: ")]
    assert lines[0] == "fxopt: the model around its blocks: capturing, 0 s"
    assert "fxopt: the blocks (3 blocks): capture 1, rewriting and proving, 0 s" in lines
    assert "fxopt: the blocks (3 blocks): capture 1, compiling, 0 s" in lines
    assert "fxopt: the blocks (3 blocks): compiled, 0 s" in lines
    assert "fxopt: what stands after the blocks: compiling, 0 s" in lines
    caplog.clear()
    train(model)
    assert not [line for line in caplog.messages if line.startswith("fxopt: ")], "nothing new is compiled"


def test_on_a_terminal_one_line_is_written_over_and_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    progress = Progress()
    progress.show("model.layers (28 blocks)", "capture 1, rewriting and proving")
    progress.done("model.layers (28 blocks)")
    first, second, last = terminal.getvalue().split("\r\x1b[2K")[0:3]
    assert (first, last) == ("", "")
    assert second == "fxopt: model.layers (28 blocks): cap..."
    progress.wipe()
    assert terminal.getvalue().count("\x1b[2K") == 2


def test_the_line_is_wiped_where_a_block_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * x.sum().item()

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    train(fxopt.optimize(nn.Sequential(Reading(), Reading())))
    assert "capturing" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")
