"""Blocks of one list that differ in size, as the stages of vision models do: each is captured with its own sizes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fxopt.capture import torch_lowering
from fxopt.capture.installation import Installation
from fxopt.report.records import MODEL_REGION


class Stage(nn.Module):
    """Makes one token of each two neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, 2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return half as many tokens, twice as wide."""
        batch, length, width = x.shape
        return self.linear(x.reshape(batch, length // 2, 2 * width)).tanh()


def test_stages_of_different_sizes_share_no_sizes_that_change():
    torch.manual_seed(0)
    stock = nn.Sequential(Stage(4), Stage(8), Stage(16))
    model = copy.deepcopy(stock)
    changing: list[int] = []

    def transform(gm: torch.fx.GraphModule, *, region: str, lazy_outputs: bool) -> None:
        if region == MODEL_REGION:
            return
        placeholders = gm.graph.find_nodes(op="placeholder")
        changing.append(sum(isinstance(node.meta["example_value"], torch.SymInt) for node in placeholders))

    installation = Installation(model, None, transform, torch_lowering.plain_backend, partial=False)
    installation.install()

    def step(module: nn.Module, batch: int) -> list[Any]:
        module.zero_grad()
        module(torch.randn(batch, 16, 4, generator=torch.Generator().manual_seed(batch))).sum().backward()
        return [parameter.grad for parameter in module.parameters()]

    for batch, expected in ((2, [0, 0, 0]), (3, [1, 1, 1]), (5, [])):
        changing.clear()
        assert all(map(torch.equal, step(model, batch), step(stock, batch)))
        assert changing == expected, f"sizes that change, by capture, at batch {batch}"
    assert not installation.ledger.fallbacks
