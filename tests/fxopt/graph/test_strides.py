"""What a region returns lies in memory as in stock: the code around it may view it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.graph.strides import find_order

HEADS, WIDTH = 4, 8


def scale_norm(x: torch.Tensor, block: nn.Module) -> torch.Tensor:
    return block.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def add_norm(x: torch.Tensor, block: nn.Module) -> torch.Tensor:
    total = x + x.sin()
    return total + scale_norm(total, block)


def gated(x: torch.Tensor, block: nn.Module) -> torch.Tensor:
    return F.silu(block.gate(x)) * block.up(x)


def norm_plus(x: torch.Tensor, block: nn.Module) -> torch.Tensor:
    return scale_norm(x, block) + 1


class Turning(nn.Module):
    """A block that works on [batch, heads, length, width], a transposed view of what it is given."""

    def __init__(self, compute) -> None:
        super().__init__()
        self.compute = compute
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.project = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(self.project(x).view(*x.shape[:2], HEADS, WIDTH).transpose(1, 2), self)


class Model(nn.Module):
    """Views what each block returns as [batch, length, all heads], which is stock code to fxopt."""

    def __init__(self, compute) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Turning(compute) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).transpose(1, 2).view(*x.shape)
        return x.square().mean()


@pytest.mark.parametrize(
    ("compute", "dtype"),
    [
        (norm_plus, torch.float32),
        *(
            pytest.param(compute, dtype, marks=pytest.mark.slow)
            for compute, dtype in ((add_norm, torch.float32), (scale_norm, torch.bfloat16))
        ),
        pytest.param(add_norm, torch.bfloat16, marks=pytest.mark.exhaustive),
    ],
)
def test_what_stock_can_view_can_be_viewed(compute, dtype):
    torch.manual_seed(0)
    model = Model(compute).to(dtype)
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    for shape in ((2, 5), (3, 7)):
        x = torch.randn(*shape, HEADS * WIDTH, dtype=dtype)
        losses = [each(x) for each in (model, stock)]
        for loss in losses:
            loss.backward()
        assert torch.allclose(*losses, rtol=1e-5 if dtype is torch.float32 else 2e-2)
    report = fxopt.explain(model)
    assert {(site.pattern, site.status) for site in report.sites} == {("rms_norm", "rewritten")}
    assert not report.fallbacks


@pytest.mark.parametrize(
    "turn",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x.permute(2, 0, 1, 3),
        lambda x: x[:, ::2],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x,
    ],
)
@pytest.mark.parametrize("compute", [scale_norm, add_norm, gated, norm_plus])
def test_results_have_the_strides_of_stocks(compute, turn):
    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH))
            self.gate, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = compute(turn(x), self)
            return y, y.flatten(1)

    model = Region()
    stock = copy.deepcopy(model)
    fxopt.optimize(model, verify="off")
    x = torch.randn(2, 6, HEADS, WIDTH)
    ours, theirs = model(x), stock(x)
    assert [out.stride() for out in ours] == [out.stride() for out in theirs]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_an_order_says_nothing_of_single_items_and_unknown_layouts():
    x = torch.ones(2, 3, 4)
    assert find_order(x) == (0, 1, 2)
    assert find_order(x.permute(2, 0, 1)) == (1, 2, 0)
    assert find_order(torch.ones(2, 1, 4).transpose(1, 2)) == (0, 1, 2)
    assert find_order(x[:, :, ::2]) == (0, 1, 2)
    assert find_order(torch.ones(1, 1).expand(3, 4)) is None
    assert find_order(torch.ones(3)) is None
    assert find_order("no tensor") is None
