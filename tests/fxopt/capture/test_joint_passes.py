"""Passes over joint graphs: a gradient from elsewhere is added inside the norm's backward, nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import default_partition

from fxopt.capture.joint_passes import fold_skip_gradients, mark_recomputed, replay_inputs
from fxopt.kernels.add_rms_norm import add_rms_norm
from fxopt.kernels.lora_linear import lora_linear
from fxopt.kernels.norm_rope import norm_rope
from fxopt.kernels.rms_norm import rms_norm


class Joint:
    """Compiles a function node by node, folding in its joint graph, and keeps what was done."""

    def __init__(self) -> None:
        self.folded = -1
        self.graph = fx.Graph()

    def run(self, function: Any, *inputs: torch.Tensor) -> list[torch.Tensor]:
        def partition(joint: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
            self.folded = fold_skip_gradients(joint.graph)
            joint.graph.lint()
            self.graph = joint.graph
            return default_partition(joint, joint_inputs, **options)

        def run_nodes(graph: fx.GraphModule, _: Any) -> Any:
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=run_nodes, bw_compiler=run_nodes, partition_fn=partition)
        return gradients(torch.compile(function, backend=backend, fullgraph=True), *inputs)


def gradients(function: Any, *inputs: torch.Tensor) -> list[torch.Tensor]:
    leaves = [value.detach().requires_grad_() for value in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y) / 3)]


def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * 2 + torch.tanh(rms_norm(x, w, eps=1e-6))


def residual(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x + torch.tanh(rms_norm(x, w, eps=1e-6))


def two_norms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x + torch.tanh(rms_norm(x, w, eps=1e-6))
    return h + torch.sin(rms_norm(h, w, eps=1e-6))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(32, 33, 64, dtype=dtype), torch.randn(64, dtype=dtype)


@pytest.mark.parametrize(("function", "expected"), [(block, 1), (residual, 1), (two_norms, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_skips_gradient_is_folded_and_the_gradients_are_those_of_eager(function, expected, dtype) -> None:
    joint = Joint()
    ours = joint.run(function, *inputs(dtype))
    assert joint.folded == expected
    exact = gradients(function, *(value.double() for value in inputs(dtype)))
    eager = gradients(function, *inputs(dtype))
    for value, stock, truth in zip(ours, eager, exact, strict=True):
        error, allowed = ((other.double() - truth).norm() / truth.norm() for other in (value, stock))
        assert error <= allowed * 1.05 + 1e-7


def unread(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(rms_norm(x, w, eps=1e-6))


def test_nothing_is_folded_where_nothing_is_added() -> None:
    joint = Joint()
    joint.run(unread, *inputs())
    assert joint.folded == 0


def test_a_folded_graph_holds_no_addition_of_gradients() -> None:
    joint = Joint()
    joint.run(residual, *inputs())
    adds = joint.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    assert len(adds) == 1, "the residual's own"
    (backward,) = (node for node in joint.graph.nodes if "rms_norm_backward" in str(node.target))
    assert "dskip" in backward.kwargs


def adapted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    n = rms_norm(x, w, eps=1e-6)
    a, b, weight = w[None, :] / 8, w[:, None], torch.outer(w, w) / 8
    (y,) = lora_linear(n, [weight.detach()], [None], [None], [a], [b], owners=[0], scales=[0.5])
    return torch.tanh(y)


def test_a_norm_that_an_adapters_backward_reads_is_computed_again() -> None:
    replayed: list[int] = []

    def partition(joint: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        replayed.append(replay_inputs(joint.graph))
        mark_recomputed(joint.graph)
        joint.graph.lint()
        return default_partition(joint, joint_inputs, **options)

    def run_nodes(graph: fx.GraphModule, _: Any) -> Any:
        targets.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    targets: list[set[str]] = []
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=run_nodes, bw_compiler=run_nodes, partition_fn=partition)
    ours = gradients(torch.compile(adapted, backend=backend, fullgraph=True), *inputs())
    assert replayed == [1]
    forward, backward = targets
    assert "fxopt.rms_norm_output_0.default" not in forward
    assert "fxopt.rms_norm_output_0.default" in backward
    for value, stock in zip(ours, gradients(adapted, *inputs()), strict=True):
        assert (value - stock).norm() <= 1e-5 * stock.norm()


@torch._dynamo.allow_in_graph
def turn_heads(*tensors: torch.Tensor, eps: float) -> Any:
    return norm_rope(*tensors, eps=eps)


def turned(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    heads = x.view(32, 1, 33, 64)
    tables = [table.detach().expand(1, 1, 33, 64) for table in (torch.cos(w), torch.sin(w))]
    q, k = turn_heads(heads, heads * 2, w, w, *tables, eps=1e-6)
    return torch.sin(q) + torch.cos(k)


def test_heads_that_were_normed_and_turned_are_computed_again_whole() -> None:
    """Their op's backward keeps all that they are computed from; what reads them shall not keep them too."""
    held: list[set[str]] = []

    def partition(joint: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        mark_recomputed(joint.graph)
        joint.graph.lint()
        return default_partition(joint, joint_inputs, **options)

    def run_nodes(graph: fx.GraphModule, _: Any) -> Any:
        held.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=run_nodes, bw_compiler=run_nodes, partition_fn=partition)
    ours = gradients(torch.compile(turned, backend=backend, fullgraph=True), *inputs())
    forward, backward = held
    assert "fxopt.norm_rope.default" in forward
    assert "fxopt.norm_rope.default" in backward
    for value, stock in zip(ours, gradients(turned, *inputs()), strict=True):
        assert (value - stock).norm() <= 1e-5 * stock.norm()


def test_a_sum_and_its_norm_are_not_computed_again_whole() -> None:
    """Its op's backward reads the sum, which is saved anyway, and not the two that were added."""
    held: list[set[str]] = []

    def run_nodes(graph: fx.GraphModule, _: Any) -> Any:
        held.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    def partition(joint: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        mark_recomputed(joint.graph)
        return default_partition(joint, joint_inputs, **options)

    def summed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h, n = add_rms_norm(torch.tanh(x), x, w, eps=1e-6)
        return h + torch.sin(n)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=run_nodes, bw_compiler=run_nodes, partition_fn=partition)
    ours = gradients(torch.compile(summed, backend=backend, fullgraph=True), *inputs())
    assert "fxopt.add_rms_norm.default" not in held[1]
    for value, stock in zip(ours, gradients(summed, *inputs()), strict=True):
        assert (value - stock).norm() <= 1e-5 * stock.norm()
