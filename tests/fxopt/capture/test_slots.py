"""The compile slots: who else may fill them, record through them, or wrap what holds them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fxopt.capture.slot import COMPILED_AROUND, RECORDED

IDS = torch.randint(1, 256, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("strict", "training"), [(False, True), pytest.param(True, False, marks=pytest.mark.slow)]
)
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


def test_a_model_compiled_from_outside_is_served_and_none_of_fxopts_frames_is_traced(
    twins, install, assert_same_step
):
    model, stock = twins()
    installation = install(model)
    compiled = torch.compile(model, backend="eager")
    torch._dynamo.utils.counters["graph_break"].clear()
    torch._dynamo.utils.warn_once_cache.clear()
    assert_same_step(
        model, stock, lambda each: (compiled if each is model else each)(input_ids=IDS, labels=IDS).loss
    )
    breaks = list(torch._dynamo.utils.counters["graph_break"])
    assert len(breaks) == 1
    assert "torch.compiler.disable" in breaks[0]
    assert not torch._dynamo.utils.warn_once_cache
    assert next(iter(installation.ledger.notes)) == COMPILED_AROUND
    assert not installation.ledger.fallbacks
    assert len(installation.ledger.captures) == 2


@pytest.mark.slow
def test_without_gradients_a_model_compiled_from_outside_is_the_outsiders(twins, install):
    model, stock = (each.eval() for each in twins())
    installation = install(model)
    graphs: list[torch.fx.GraphModule] = []

    def remember(gm: torch.fx.GraphModule, _: object):
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        logits = torch.compile(model, backend=remember)(input_ids=IDS).logits
        assert torch.equal(logits, stock(input_ids=IDS).logits)
    assert graphs
    assert not installation.ledger.captures


def test_a_shallow_copy_compiled_from_outside_runs_its_own_parameters(install):
    model = nn.Sequential(*(Residual() for _ in range(3)))
    install(model)
    twin = copy.copy(model)
    twin._modules = {name: copy.deepcopy(child) for name, child in model._modules.items()}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    x = torch.randn(4, 8)
    compiled = torch.compile(twin, backend="eager")
    assert torch.equal(compiled(x), x)
    with torch.no_grad():
        assert torch.equal(compiled(x), x)
