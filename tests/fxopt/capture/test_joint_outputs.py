"""The pass that writes a value beside its gradients: the unit is computed once, forward, and gradients are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition

from fxopt.capture.joint_outputs import write_outputs_beside_gradients
from fxopt.capture.joint_passes import mark_recomputed
from fxopt.kernels.glu import glu
from fxopt.kernels.lora_linear import lora_linear

WIDTH, INNER, RANK = 32, 48, 4
Tensors = tuple[torch.Tensor, ...]


def project(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return lora_linear(x, [weight], [None], [None], [a], [b], owners=[0], scales=[0.5])[0]


def gated(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: Any
) -> Any:
    h = glu(x @ gate.t(), x @ up.t(), act="silu")
    return torch.tanh(project(h, weight, a, b))


def read_twice(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor, a: Any, b: Any
) -> Any:
    h = glu(x @ gate.t(), x @ up.t(), act="silu")
    return torch.tanh(project(h, weight, a, b)) + h.sum(-1, keepdim=True)


def packed(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor, a: Any, b: Any
) -> Any:
    h = glu(x @ torch.cat([gate, up]).t(), act="silu", layout="packed")
    return torch.tanh(project(h, weight, a, b))


def tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 5, WIDTH), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER), (RANK, INNER), (WIDTH, RANK)]
    return [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes]


def gradients(function: Callable[..., torch.Tensor], frozen: tuple[int, ...]) -> list[torch.Tensor]:
    leaves = [value.requires_grad_(place not in frozen) for place, value in enumerate(tensors())]
    y = function(*leaves)
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, needed, torch.ones_like(y) / 3)]


def compiled(
    function: Any, partition: Any, frozen: tuple[int, ...]
) -> tuple[list[torch.Tensor], int, list[list[str]]]:
    """Return results and gradients, how many ops were split, and fxopt's ops in the forward and backward graph."""
    counts: list[int] = []
    targets: list[list[str]] = []

    def run_partition(joint: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        counts.append(write_outputs_beside_gradients(joint.graph))
        mark_recomputed(joint.graph)
        joint.graph.lint()
        return partition(joint, joint_inputs, **options)

    def run_nodes(graph: fx.GraphModule, _: Any) -> Any:
        names = [str(node.target) for node in graph.graph.nodes]
        targets.append([name.split(".")[1] for name in names if name.startswith("fxopt.")])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=run_nodes, bw_compiler=run_nodes, partition_fn=run_partition)
    found = gradients(torch.compile(function, backend=backend, fullgraph=True), frozen)
    return found, counts[0], targets


@pytest.mark.parametrize("partition", [default_partition, min_cut_rematerialization_partition])
@pytest.mark.parametrize("frozen", [(3,), ()], ids=["frozen", "trained"])
def test_the_unit_is_not_computed_again_before_its_gradient(partition: Any, frozen: tuple[int, ...]) -> None:
    found, count, (forward, backward) = compiled(gated, partition, frozen)
    assert count == 1
    assert forward == ["glu", "lora_linear"]
    assert backward == ["lora_linear_backward", "glu_backward_output", "lora_linear_backward"]
    for value, stock in zip(found, gradients(gated, frozen), strict=True):
        assert (value - stock).norm() <= 1e-6 * stock.norm()


@pytest.mark.parametrize(
    ("function", "frozen"),
    [
        pytest.param(read_twice, (3,), id="the gradient has another part"),
        pytest.param(packed, (3,), id="nothing that is saved is like the unit's value"),
        pytest.param(gated, (3, 4, 5), id="no gradient but the input's"),
    ],
)
def test_what_cannot_be_split_is_left(function: Any, frozen: tuple[int, ...]) -> None:
    found, count, _ = compiled(function, default_partition, frozen)
    assert count == 0
    for value, stock in zip(found, gradients(function, frozen), strict=True):
        assert (value - stock).norm() <= 1e-6 * stock.norm()
