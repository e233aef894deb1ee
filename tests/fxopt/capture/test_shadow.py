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
        self.names, self.itself = ["a"], {"linear": self.linear}
        self.itself["me"] = self.itself
        self.scales, self.kept = {self.linear: 1.0}, {self.linear}
        self.alias = self.norms
        self.inner = nn.Sequential(nn.Tanh(), nn.Dropout(), nn.Identity())
        del self.inner[1]

    def act(self, x: torch.Tensor, power: int = 1) -> torch.Tensor:
        scale = self.scales[self.linear] if self.linear in self.kept else 0.0
        return self.inner(self.linear(x)) ** power * scale

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
    shadow.names.append("b")
    assert block.names == ["a"], "what is put into a container is not the block's"
    assert shadow.alias is shadow.norms, "what has two names still has them"
    assert list(shadow.scales) == [shadow.linear] == list(shadow.kept)
    assert shadow.itself["linear"] is shadow.linear
    assert type(shadow.inner._modules) is type(block.inner._modules)
    assert shadow.inner[0] is not block.inner[0]
    assert all((tensor == 0.5).all() for tensor in (*shadow.parameters(), shadow.offset))
    shadow.added, shadow.linear.added = 1, 2
    assert shadow(torch.ones(2, 8)).shape == (2, 8)
    for module, attributes in before.items():
        assert module.__dict__ == attributes


class Counting(nn.Module):
    """A block that counts in containers, tensors and buffers, and caches a table; `looks`: it looks at values."""

    def __init__(self, looks: bool, kept: str) -> None:
        super().__init__()
        self.linear, self.looks, self.kept = nn.Linear(8, 8), looks, kept
        self.count, self.tables, self.seen = {"calls": 0}, dict[int, torch.Tensor](), list[float]()
        self.total = torch.zeros(())
        self.register_buffer("calls", torch.zeros(()))
        self.read: Callable[[], torch.Tensor] = lambda: self.calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.looks and float(x.detach().abs().max()) > 1e9:
            x = x * 0
        if self.kept == "count":
            self.count["calls"] += 1
        elif self.kept == "table":
            if x.shape[1] not in self.tables:
                self.tables[x.shape[1]] = x.new_ones(x.shape[1])
            x = x * self.tables[x.shape[1]]
        elif self.kept == "list":
            self.seen.append(1.0)
        elif self.kept == "tensor":
            self.total.add_(1)
        elif self.kept == "buffer by closure":
            self.read().add_(1)
        elif self.kept == "weight":
            with torch.no_grad():
                self.linear.weight.mul_(0.99)
        return x + self.linear(x) * (1 + self.count["calls"] + self.total + self.calls)


@pytest.mark.parametrize("looks", [False, True], ids=["", "looking"])
@pytest.mark.parametrize("kept", ["count", "table", "list", "tensor", "buffer by closure", "weight"])
@pytest.mark.filterwarnings("ignore")
def test_capture_leaves_no_trace_in_a_block(kept: str, looks: bool) -> None:
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(4, 8)
    model.layers = nn.ModuleList(Counting(looks, kept) for _ in range(3))
    stock = copy.deepcopy(model)
    for layer in stock.layers:
        layer.read = reader(layer)  # a closure is copied with what it holds
    fxopt.optimize(model)
    for _ in range(3):
        ours, theirs = model(x), stock(x)
        torch.testing.assert_close(ours, theirs)
        ours.backward()
        theirs.backward()
    for layer, other in zip(model.layers, stock.layers, strict=True):
        assert (layer.count, layer.seen, layer.total, layer.calls) == (
            other.count,
            other.seen,
            other.total,
            other.calls,
        )
        assert all(type(table) is torch.Tensor for table in layer.tables.values())
    for found, expected in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found.grad, expected.grad)


def reader(layer: nn.Module) -> Callable[[], torch.Tensor]:
    """Return a function whose closure holds `layer`."""
    return lambda: layer.calls


class Holder:
    """An object that calls a module, and is none itself."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.module.last = x
        return self.module(x)


class Reached(nn.Module):
    """A block whose layer an object calls, which sets an attribute of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.call = Holder(self.linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.call(x)


def test_what_an_object_reaches_is_given_back(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(4, 8)
    model.layers = nn.ModuleList(Reached() for _ in range(3))
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    torch.testing.assert_close(model(x), stock(x))
    for layer in model.layers:
        assert type(layer.linear.last) is torch.Tensor
    assert any("a block sets Linear.last" in each.reason for each in fxopt.explain(model).fallbacks)


def test_a_scripted_module_is_called_as_it_is() -> None:
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(4, 8)
    model.head = torch.jit.script(nn.Linear(8, 8))
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    torch.testing.assert_close(model(x), stock(x))


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
