"""Python's collector: not during a first step's captures, as before after it."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from torch import nn

import fxopt
from fxopt import pipeline
from fxopt.capture.collecting import uncollected


def test_the_first_step_captures_without_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[bool] = []
    canonicalize = pipeline.canonicalize
    monkeypatch.setattr(
        pipeline, "canonicalize", lambda gm: (enabled.append(gc.isenabled()), canonicalize(gm))
    )
    model = fxopt.optimize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).train())
    model(torch.ones(2, 8))
    assert enabled
    assert not any(enabled)
    assert gc.isenabled()


def test_who_switched_the_collector_off_finds_it_off() -> None:
    gc.disable()
    try:
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
    with contextlib.suppress(ValueError), uncollected():
        raise ValueError
    assert gc.isenabled()
    with uncollected(needed=False):
        assert gc.isenabled()
