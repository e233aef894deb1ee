"""A class that another package patched is said plainly; a stock one and a wrapped one are not."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.capture.patched import find_own_forwards, find_patched, find_replaced


class Block(nn.Module):
    """A linear layer and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).tanh()


def test_a_patched_class_is_noted_with_the_package_that_did_it(monkeypatch, caplog) -> None:
    def foreign(self: Block, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).tanh() * 1

    foreign.__module__ = "other_kernels.transformers.blocks"
    monkeypatch.setattr(Block, "forward", foreign)
    model = nn.Sequential(Block(), Block()).train()
    fxopt.optimize(model)
    model(torch.randn(2, 4)).sum().backward()
    assert any("Block was patched by other_kernels" in note for note in fxopt.explain(model).notes)
    assert "Block was patched by other_kernels" in caplog.text


def test_a_wrapped_forward_is_no_patch(monkeypatch) -> None:
    original = Block.forward

    @functools.wraps(original)
    def wrapped(self: Block, x: torch.Tensor) -> torch.Tensor:
        return original(self, x)

    monkeypatch.setattr(Block, "forward", wrapped)
    assert find_patched(nn.Sequential(Block())) == ()


def forward_of(package: str, original: Any) -> Any:
    """Return a forward that code of `package` wraps around `original`."""
    scope: dict[str, Any] = {"__name__": package}
    exec("def forward(self, x):\n    return self.linear(x)", scope)
    return functools.wraps(original)(scope["forward"])


def called_by_an_object(forward: Any, module: nn.Module) -> Any:
    scope: dict[str, Any] = {"__name__": "a_trainer.utils", "forward": forward, "module": module}
    exec("class Wrapper:\n    def __call__(self, x):\n        return forward(module, x)", scope)
    return scope["Wrapper"]()


@pytest.mark.parametrize("bind", [types.MethodType, functools.partial, called_by_an_object])
def test_a_forward_on_the_object_is_named_with_the_package_that_put_it_there(bind: Any) -> None:
    model = nn.Sequential(Block(), Block())
    assert find_own_forwards(model) == ()
    model[1].forward = bind(forward_of("a_trainer.utils", Block.forward), model[1])
    (line,) = find_own_forwards(model)
    assert line.startswith("Block: a_trainer put a forward of its own on this model")
    assert find_replaced(model) is model[1]


def test_a_forward_is_replaced_where_another_package_than_a_wrapper_of_forwards_put_it() -> None:
    model = nn.Sequential(Block(), Block())
    assert find_replaced(model) is None
    model[0].forward = types.MethodType(forward_of("accelerate.utils", Block.forward), model[0])
    assert find_replaced(model) is None
    trained = forward_of("a_trainer.utils", Block.forward)
    model[1].forward = types.MethodType(forward_of("accelerate.utils", trained), model[1])
    assert find_replaced(model) is model[1], "what a wrapper wraps counts as well"
