"""The pass that makes one op of a unit's backward and those of the layers around it: gradients are the same."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from fxopt.capture.joint_passes import prepare_joint
from fxopt.capture.planning import Mark
from fxopt.kernels.glu import glu
from fxopt.kernels.lora_linear import lora_linear

WIDTH, INNER, RANK = 32, 48, 4


def feed_forward(x: torch.Tensor, weights: Any, a: Any, b: Any) -> torch.Tensor:
    gate, up = lora_linear(
        x, weights[:2], [None, None], [None, None], a[:2], b[:2], owners=[0, 1], scales=[0.5, 2.0]
    )
    h = glu(gate, up, act="silu")
    return lora_linear(h, [weights[2]], [None], [None], [a[2]], [b[2]], owners=[0], scales=[0.25])[0]


def plain(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    return torch.tanh(feed_forward(x.sin(), rest[:3], rest[3:6], rest[6:]))


def gate_read_twice(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    weights, a, b = rest[:3], rest[3:6], rest[6:]
    gate, up = lora_linear(
        x, weights[:2], [None, None], [None, None], a[:2], b[:2], owners=[0, 1], scales=[0.5, 2.0]
    )
    h = glu(gate, up, act="silu")
    y = lora_linear(h, [weights[2]], [None], [None], [a[2]], [b[2]], owners=[0], scales=[0.25])[0]
    return torch.tanh(y) + gate.sum(-1, keepdim=True)


def apart(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    weights, a, b = rest[:3], rest[3:6], rest[6:]
    gate, up = (
        lora_linear(x, [weights[i]], [None], [None], [a[i]], [b[i]], owners=[0], scales=[0.5])[0]
        for i in range(2)
    )
    h = glu(gate, up, act="silu")
    return torch.tanh(
        lora_linear(h, [weights[2]], [None], [None], [a[2]], [b[2]], owners=[0], scales=[1.0])[0]
    )


def leaves() -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 5, WIDTH), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)]
    shapes += [(RANK, WIDTH), (RANK, WIDTH), (RANK, INNER), (INNER, RANK), (INNER, RANK), (WIDTH, RANK)]
    values = [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes]
    return [value.requires_grad_(place not in (1, 2, 3)) for place, value in enumerate(values)]


def gradients(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    given = leaves()
    y = function(*given)
    needed = [leaf for leaf in given if leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, needed, torch.ones_like(y) / 3)]


def compiled(function: Any, mark: Mark | None = None) -> tuple[list[torch.Tensor], list[str]]:
    """Return results and gradients, and fxopt's ops in the backward graph; see `compiled_both`."""
    found, _, backward = compiled_both(function, mark)
    return found, backward


def compiled_both(function: Any, mark: Mark | None = None) -> tuple[list[torch.Tensor], list[str], list[str]]:
    """Return results and gradients, and fxopt's ops in both graphs."""
    targets: list[list[str]] = []

    def run_partition(joint: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        prepare_joint(joint.graph, mark)
        joint.graph.lint()
        return min_cut_rematerialization_partition(joint, joint_inputs, **options)

    def run_nodes(graph: fx.GraphModule, _: Any) -> Any:
        names = [str(node.target) for node in graph.graph.nodes]
        targets.append([name.split(".")[1] for name in names if name.startswith("fxopt.")])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=run_nodes, bw_compiler=run_nodes, partition_fn=run_partition)
    found = gradients(torch.compile(function, backend=backend, fullgraph=True))
    return found, *targets


def test_one_op_does_a_units_backward_and_the_rest_of_the_layers() -> None:
    found, forward, backward = compiled_both(plain)
    assert forward == ["lora_linear", "glu_layers"]
    assert backward == ["lora_linear_backward", "glu_layers_backward"]
    for value, stock in zip(found, gradients(plain), strict=True):
        assert (value - stock).norm() <= 1e-6 * stock.norm()


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(gate_read_twice, id="a gradient is added to before the layers read it"),
        pytest.param(apart, id="gate and up come from layers of their own"),
    ],
)
def test_what_somebody_else_reads_stays_apart(function: Any) -> None:
    found, forward, backward = compiled_both(function)
    assert forward[-1] == "glu_layers", "nobody else reads the unit's value"
    assert "glu_backward_output" in backward
    assert "glu_layers_backward" not in backward
    for value, stock in zip(found, gradients(function), strict=True):
        assert (value - stock).norm() <= 1e-6 * stock.norm()


def value_read_twice(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    weights, a, b = rest[:3], rest[3:6], rest[6:]
    gate, up = lora_linear(
        x, weights[:2], [None, None], [None, None], a[:2], b[:2], owners=[0, 1], scales=[0.5, 2.0]
    )
    h = glu(gate, up, act="silu")
    y = lora_linear(h, [weights[2]], [None], [None], [a[2]], [b[2]], owners=[0], scales=[0.25])[0]
    return torch.tanh(y) + h.sum(-1, keepdim=True)


def test_a_value_that_somebody_else_reads_is_computed_by_itself() -> None:
    found, forward, _ = compiled_both(value_read_twice)
    assert forward == ["lora_linear", "glu", "lora_linear"]
    for value, stock in zip(found, gradients(value_read_twice), strict=True):
        assert (value - stock).norm() <= 1e-6 * stock.norm()


def test_where_a_plan_decides_each_layers_result_may_be_computed_alone_and_units_are_joined_all_the_same() -> (
    None
):
    seen: list[fx.Graph] = []
    mark = Mark(lambda graph, held: seen.append(graph) or "a plan")
    found, backward = compiled(plain, mark)
    (graph,) = seen
    alone = [node for node in graph.nodes if node.target is torch.ops.fxopt.lora_linear_output.default]
    outputs = {node.name for node in graph.nodes if node.target is operator.getitem}
    assert len(alone) == 2
    assert {node.meta["replays"] for node in alone} <= outputs
    assert backward.count("lora_linear_output") == 2
    assert [name for name in backward if name.endswith("backward")] == [
        "lora_linear_backward",
        "glu_layers_backward",
    ]
    for value, stock in zip(found, gradients(plain), strict=True):
        assert (value - stock).norm() <= 1e-6 * stock.norm()
