"""Floats that differ from layer to layer: numbers where a pattern takes them, symbols elsewhere."""

from __future__ import annotations

import copy

import torch
from torch import nn

import fxopt
from fxopt.capture.installation import find_installation


class Block(nn.Module):
    def __init__(self, eps: float, scale: float) -> None:
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.ones(8)), nn.Linear(8, 8)
        self.eps, self.scale = eps, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
        return x + self.linear(norm) * self.scale + x * (self.scale * 2 - 1)


class Tower(nn.Module):
    def __init__(self, floats: list[tuple[float, float]]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Block(*pair) for pair in floats)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def assert_steps_as(model: nn.Module, stock: nn.Module) -> None:
    x = torch.randn(2, 4, 8)
    for each in (model, stock):
        each.zero_grad()
        each(x).square().sum().backward()
    torch.testing.assert_close(model(x), stock(x), rtol=1e-5, atol=1e-6)
    for own, expected in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-4, atol=1e-5)


def num_captures(model: nn.Module) -> int:
    installation = find_installation(model)
    assert installation is not None
    return len(installation.ledger.captures)


def test_each_norm_is_rewritten_with_the_eps_of_its_own_layer() -> None:
    eps = [0.1, 0.2, 0.3, 0.2, 0.1]
    model = Tower([(each, 0.5) for each in eps])
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    assert_steps_as(model, stock)
    report = fxopt.explain(model)
    assert sum(site.count for site in report.sites if site.status == "rewritten") == 5
    assert {rewrite.attributes["eps"] for rewrite in report.rewrites} == {0.1, 0.2, 0.3}
    captured = num_captures(model)
    assert_steps_as(model, stock)
    assert num_captures(model) == captured, "a second step captures nothing"


def test_a_float_that_no_pattern_takes_stays_one_capture() -> None:
    model = Tower([(0.1, 0.1 * layer) for layer in range(1, 7)])
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    assert_steps_as(model, stock)
    report = fxopt.explain(model)
    assert sum(site.count for site in report.sites if site.status == "rewritten") == 6
    (blocks,) = (region for region in report.regions if region.kind == "block")
    assert blocks.captures == 2
