"""Models that write in place around their blocks: the same loss as stock, whatever the cut costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt


class Writing(nn.Module):
    """Three blocks and a head; `write` says where something is written to in place."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.write = write
        self.table = nn.Embedding(32, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(8, 32)
        self.register_buffer("scale", torch.full((8,), 2.0))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.table(ids)
        factor: Any = 1.0
        if self.write == "a fresh mask before the blocks":
            factor = torch.zeros(8)
            factor[:4] = 1.0
        elif self.write == "a buffer before the blocks":
            factor = self.scale * 2
            self.scale.mul_(0.5)
        for layer in self.layers:
            x = layer(x)
        x = x * factor
        if self.write == "before the logits":
            x = x * 2
            x[:, 0] = 0
        logits = self.head(x * 2)
        if self.write == "after the logits":
            x[:, 0] = 0
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten()) + x.square().mean()
        if self.write == "what only the loss reads":
            counts = torch.zeros(32).scatter_add_(0, ids.flatten(), torch.ones(ids.numel()))
            loss = loss + (counts * self.head.bias).mean()
        return loss, logits


@pytest.mark.parametrize(
    "write",
    ["a fresh mask before the blocks", "a buffer before the blocks", "before the logits", "after the logits"],
)
def test_what_is_written_in_place_is_read_as_in_stock(write: str) -> None:
    report, _ = run_steps(write)
    told = [*(fallback.reason for fallback in report.fallbacks), *report.notes]
    assert any("in place" in text for text in told), told


def test_what_is_written_where_nothing_else_reads_it_splits_nothing() -> None:
    report, logits = run_steps("what only the loss reads")
    assert report.fallbacks == ()
    assert not any("in place" in note for note in report.notes)
    assert logits.is_lazy


def run_steps(write: str) -> tuple[fxopt.Report, Any]:
    """Return the report and the logits after two steps that equal stock's."""
    torch.manual_seed(0)
    model = Writing(write).train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    ids = torch.randint(32, (2, 5))
    for _ in range(2):
        (loss, logits), (expected, stock_logits) = model(ids), stock(ids)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(logits + 0, stock_logits)
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    return fxopt.explain(model), model(ids)[1]
