"""Warming: nothing on a CPU; on a GPU a compiled step finds Inductor loaded."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from fxopt.capture import torch_lowering, warming


def test_a_cpu_model_starts_nothing(monkeypatch) -> None:
    monkeypatch.setattr(warming, "_start", lambda: pytest.fail("a thread was started for a CPU"))
    warming.start_warming(torch.device("cpu"))


def test_a_failure_to_warm_up_is_logged_and_nothing_else(monkeypatch, caplog) -> None:
    def broken() -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(torch_lowering, "load_inductor", broken)
    with caplog.at_level("DEBUG", logger="fxopt"):
        warming._warm()
    assert "OSError: no compiler" in caplog.text


@pytest.mark.gpu
def test_on_a_gpu_inductor_is_loaded_in_the_background() -> None:
    warming.start_warming(torch.device("cuda"))
    for thread in threading.enumerate():
        if thread.name == "fxopt-warming":
            thread.join(timeout=120)
    assert "torch._inductor.compile_fx" in sys.modules
    torch_lowering.load_inductor()
