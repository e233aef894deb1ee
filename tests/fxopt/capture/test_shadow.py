"""Blocks run on stand-ins as copies of their own: the model's modules stay as they are, for whoever runs them."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.capture.shadow import shadow_of


class Block(nn.Module):
    """A norm under two names, in a list beside them, and in what is bound to the block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.RMSNorm(8)
        self.second = self.first
        self.linear = nn.Linear(8, 8)
        self.register_buffer("offset", torch.ones(8))
        self.norms = [self.first, self.second]
        self.by_name = {"linear": self.linear}
        self.bound, self.partial = self.act, functools.partial(self.act, power=2)
        self.names = ["a"]

    def act(self, x: torch.Tensor, power: int = 1) -> torch.Tensor:
        return self.linear(x).tanh() ** power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.partial(self.norms[0](x))
        return x + self.bound(self.second(x)) + self.offset


class Blocks(nn.Module):
    """Three of them and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()


def test_a_shadow_holds_its_own_modules_wherever_the_block_holds_them() -> None:
    block = Block()
    before = {module: dict(module.__dict__) for module in block.modules()}
    made = {id(tensor): torch.full_like(tensor, 0.5) for tensor in (*block.parameters(), block.offset)}
    shadow: Any = shadow_of(block, made)
    assert shadow.first is shadow.second is shadow.norms[0] is not block.first
    assert shadow.by_name["linear"] is shadow.linear is not block.linear
    assert shadow.bound.__self__ is shadow.partial.func.__self__ is shadow
    assert shadow.names is block.names, "what holds no module is the same"
    assert all((tensor == 0.5).all() for tensor in (*shadow.parameters(), shadow.offset))
    shadow.added, shadow.linear.added = 1, 2
    assert shadow(torch.ones(2, 8)).shape == (2, 8)
    for module, attributes in before.items():
        assert module.__dict__ == attributes


@pytest.mark.parametrize("run", [fxopt.explain, fxopt.trace, None])
def test_a_module_under_two_names_keeps_its_weights(run: Callable[..., Any] | None) -> None:
    torch.manual_seed(0)
    model, x = Blocks().train(), torch.randn(4, 8)
    stock = copy.deepcopy(model)
    if run is None:
        fxopt.optimize(model)
    else:
        run(model, {"x": x})
    ours, theirs = model(x), stock(x)
    assert torch.allclose(ours, theirs)
    ours.backward()
    theirs.backward()
    for found, expected in zip(model.parameters(), stock.parameters(), strict=True):
        assert type(found) is nn.Parameter
        torch.testing.assert_close(found.grad, expected.grad)
    if run is None:
        assert fxopt.explain(model).fallbacks == ()


def test_another_thread_runs_the_model_while_it_is_captured() -> None:
    torch.manual_seed(0)
    model, x = Blocks().train(), torch.randn(4, 8)
    expected = model(x).detach()
    fxopt.optimize(model)
    is_over, failures, results = threading.Event(), list[BaseException](), list[torch.Tensor]()

    def evaluate() -> None:
        try:
            while not is_over.is_set() or not results:
                with torch.set_grad_enabled(len(results) % 2 == 0):
                    results.append(model(x).detach())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=evaluate)
    thread.start()
    try:
        torch.testing.assert_close(model(x).detach(), expected)
    finally:
        is_over.set()
        thread.join()
    assert failures == []
    for result in results:
        torch.testing.assert_close(result, expected)
