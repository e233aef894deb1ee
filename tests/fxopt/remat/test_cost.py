"""What a step takes: kernels count what they read and write, the optimizer what it moves."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

import fxopt
from fxopt.remat.cost import flops_of
from fxopt.remat.devices import BANDWIDTH_SHARE, OTHER
from fxopt.remat.figures import UPDATE_SHARE
from fxopt.remat.joint import read_joint

BYTES = 4 * 64 * 1024
BYTE_PS = 1e12 / (OTHER.bandwidth * BANDWIDTH_SHARE)
aten = torch.ops.aten


def graph_of(make):
    """Return a graph of inputs a, b and c and what `make` does to them."""
    graph = fx.Graph()
    with FakeTensorMode():
        inputs = [graph.placeholder(name) for name in "abc"]
        for node in inputs:
            node.meta["val"] = torch.empty(64, 1024)

        def call(target, *args):
            node = graph.call_function(target, args)
            node.meta["val"] = target(*fx.map_arg(args, lambda item: item.meta["val"]))
            return node

        graph.output((make(call, *inputs),))
    return graph


def cost_of(make, *, fuses):
    joint = read_joint(graph_of(make), (), OTHER, fuses=fuses)
    return joint.compute_cost / BYTE_PS / BYTES


def test_a_fused_kernel_reads_what_its_inner_values_are_computed_from():
    def make(call, a, b, c):
        return call(aten.mul.Tensor, call(aten.add.Tensor, a, b), c)

    assert cost_of(make, fuses=False) == pytest.approx(6, abs=0.01), "two kernels of two reads and a write"
    assert cost_of(make, fuses=True) == pytest.approx(4, abs=0.01), "one kernel of three reads and a write"


def test_what_two_parts_of_a_kernel_read_is_read_once():
    def make(call, a, b, c):
        return call(aten.mul.Tensor, call(aten.exp.default, a), call(aten.tanh.default, a))

    assert cost_of(make, fuses=True) == pytest.approx(2, abs=0.01)


def test_a_step_ends_with_the_optimizers():
    class Block(nn.Module):
        def __init__(self, width: int = 64) -> None:
            super().__init__()
            self.up = nn.Linear(width, width, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.up(x).relu()

    model = nn.Sequential(*(Block() for _ in range(3)))
    inputs = {"input": torch.randn(8, 64)}
    plan = fxopt.plan(model, None, inputs)
    trained = 3 * 64 * 64 * 4
    assert plan.update_ms == pytest.approx(7 * trained / (OTHER.bandwidth * UPDATE_SHARE) * 1e3)
    rest = [plan.decisions[number].compute_ms for _, number in plan.layers] + [
        d.compute_ms for d in plan.after
    ]
    assert plan.step_ms == pytest.approx(plan.update_ms + sum(rest))
    for part in model[1:]:
        part.requires_grad_(False)
    assert fxopt.plan(model, None, inputs).update_ms == pytest.approx(plan.update_ms / 3)


@pytest.mark.parametrize(
    "op", ["_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"]
)
def test_attention_of_grouped_heads_is_counted_as_with_a_key_for_each_query(op):
    """Torch 2.11 has no formula for it, and a block whose cost could not be counted ran stock."""
    target = getattr(torch.ops.aten, op).default

    def count(num_keys: int) -> int:
        graph = fx.Graph()
        shapes = {"q": (2, 8, 16, 32), "k": (2, num_keys, 24, 32), "v": (2, num_keys, 24, 32)}
        nodes = []
        with FakeTensorMode():
            for name, shape in shapes.items():
                nodes.append(graph.placeholder(name))
                nodes[-1].meta["val"] = torch.empty(shape, dtype=torch.bfloat16)
            more = (None, False) if "efficient" in op else ()
            node = graph.call_function(target, (*nodes, *more))
            node.meta["val"] = torch.empty(shapes["q"], dtype=torch.bfloat16)
            return flops_of(node)

    assert count(2) == count(8) == 2 * 2 * 2 * 8 * 16 * 24 * 32
