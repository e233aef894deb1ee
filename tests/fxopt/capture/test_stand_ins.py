"""Blocks under capture of the whole model: what stands in for their weights carries what theirs do."""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn

from fxopt.report.records import MODEL_REGION


class Packed(nn.Parameter):
    """A weight in eighths, with its scales set on it, as 4-bit parameters have theirs."""

    scales: torch.Tensor


class PackedLinear(nn.Module):
    """Unpacks its weight by what the weight itself carries."""

    def __init__(self, width: int) -> None:
        super().__init__()
        packed = torch.randint(-8, 8, (width, width), dtype=torch.int8)
        self.weight = Packed(packed, requires_grad=False)
        self.weight.scales = torch.rand(width, 1) / 8
        self.adapter = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.float() * self.weight.scales
        return x + nn.functional.linear(x, weight) + self.adapter(x)


class Stack(nn.Module):
    """Three such layers and a head with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 8)
        self.layers = nn.ModuleList(PackedLinear(8) for _ in range(3))
        self.head = nn.Linear(8, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def test_a_weight_that_carries_its_scales_does_not_keep_the_head_stock(install, assert_same_step):
    torch.manual_seed(0)
    model = Stack().train()
    stock = copy.deepcopy(model)
    for ours, theirs in zip(model.layers, stock.layers, strict=True):
        theirs.weight.scales = ours.weight.scales
    installation = install(model)
    ids = torch.randint(32, (2, 5))
    assert_same_step(model, stock, lambda each: each(ids))
    assert installation.ledger.fallback_records() == ()
    assert MODEL_REGION in installation.ledger.served


def test_a_capture_logs_no_error_of_torch(install, build, caplog):
    """torch before 2.13 failed to write fxopt's settings into its log: a traceback per capture."""
    model = build()
    install(model)
    ids = torch.randint(1, 256, (2, 8))
    with caplog.at_level(logging.WARNING, logger="torch"):
        model(input_ids=ids, labels=ids).loss.backward()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
