"""The compile slots: who else may fill them, record through them, or wrap what holds them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxopt.capture.slot import RECORDED

IDS = torch.randint(1, 256, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("strict", "training"), [(False, True), (True, False)])
def test_export_records_the_stock_model(twins, install, strict, training):
    model, stock = twins()
    installation = install(model)
    model.train(training), stock.train(training)
    given = {"input_ids": IDS, "use_cache": False}
    exported, expected = (torch.export.export(each, (), given, strict=strict) for each in (model, stock))
    calls = [
        [node.target for node in e.graph.nodes if node.op == "call_function"] for e in (exported, expected)
    ]
    assert calls[0] == calls[1]
    assert set(exported.state_dict) == set(expected.state_dict)
    assert torch.equal(exported.module()(**given).logits, stock(**given).logits)
    assert not installation.ledger.fallbacks
    assert strict or RECORDED in installation.ledger.notes


class Residual(nn.Module):
    """A block that torch.jit can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x).tanh()


def test_a_trace_records_the_stock_model(install, assert_same_step):
    model = nn.Sequential(*(Residual() for _ in range(3)))
    installation = install(model)
    x = torch.randn(4, 8)
    model(x).sum().backward()
    traced = torch.jit.trace(model, (x,))
    assert torch.equal(traced(x), model(x))
    assert RECORDED in installation.ledger.notes
