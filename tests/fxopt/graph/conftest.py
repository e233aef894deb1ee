"""What the graph tests share: capture a function as Dynamo sees it, and compare two graphs bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx

from fxopt.graph.canonicalize import canonicalize
from fxopt.graph.verify import note_placeholders, verify


class Captured(NamedTuple):
    """A captured graph, and what it was captured with."""

    gm: fx.GraphModule
    inputs: list[Any]


def capture_call(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any
) -> Captured:
    """Return the one graph that `function` is captured as; it is not run."""
    captured: list[Captured] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        numbers = [item.node.hint if isinstance(item, torch.SymInt) else item for item in inputs]
        captured.append(Captured(gm, numbers))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic)(*args, **kwargs)
    assert len(captured) == 1, f"{len(captured)} graphs"
    return captured[0]


def run_graph(gm: fx.GraphModule, inputs: list[Any]) -> list[Any]:
    """Return the outputs of `gm`, the gradients of its inputs for random ones of the outputs, the inputs."""
    leaves = [_leaf(item) for item in inputs]
    # Not leaves, as in a model: a graph may write to its inputs.
    given = [item * 1 if isinstance(item, Tensor) and item.requires_grad else item for item in leaves]
    torch.manual_seed(1)
    outputs = [item for item in gm(*given) if isinstance(item, Tensor)]
    differentiable = [item for item in outputs if item.requires_grad]
    torch.manual_seed(2)
    gradients = [torch.randn(item.shape).to(item.dtype) for item in differentiable]
    if differentiable:
        torch.autograd.backward(differentiable, gradients)
    written = [item.detach() if isinstance(item, Tensor) else item for item in given]
    trained = [item for item in leaves if isinstance(item, Tensor) and item.requires_grad and item.is_leaf]
    return [*outputs, *(item.grad for item in trained), *written]


def _leaf(item: Any) -> Any:
    if not isinstance(item, Tensor):
        return item
    return item.detach().clone().requires_grad_(item.requires_grad)


def assert_same_bits(before: list[Any], after: list[Any]) -> None:
    """Fail unless all values are equal to the bit; NaN equals NaN, -0.0 does not equal 0.0."""
    assert len(before) == len(after)
    for place, (a, b) in enumerate(zip(before, after, strict=True)):
        if isinstance(a, Tensor):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), place
            same = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
            assert bool(same.all()), f"value {place} differs: {(a - b).abs().max()}"
            if a.is_floating_point():
                assert torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan()), place
        else:
            assert a == b or (a is None and b is None), place


def check_canonicalized(captured: tuple[fx.GraphModule, list[Any]]) -> fx.GraphModule:
    """Return `captured` canonicalized; it must be valid, and equal to stock to the bit."""
    gm, inputs = captured
    stock = copy.deepcopy(gm)
    verify(gm, "stock")
    note_placeholders(gm)
    canonicalize(gm)
    verify(gm, "canonicalize")
    assert_same_bits(run_graph(stock, inputs), run_graph(gm, inputs))
    return gm


@pytest.fixture
def capture() -> Callable[..., Captured]:
    return capture_call


@pytest.fixture
def canonical() -> Callable[[tuple[fx.GraphModule, list[Any]]], fx.GraphModule]:
    return check_canonicalized


@pytest.fixture(scope="session")
def run() -> Callable[[fx.GraphModule, list[Any]], list[Any]]:
    return run_graph


@pytest.fixture(scope="session")
def same_bits() -> Callable[[list[Any], list[Any]], None]:
    return assert_same_bits
