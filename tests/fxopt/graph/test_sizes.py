"""Sizes that capture found to be numbers after it had made tensors with symbols for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.graph.sizes import find_settled, settle_sizes


def capture(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.Graph:
    graphs: list[fx.Graph] = []

    def keep(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        settle_sizes(gm.graph)
        graphs.append(gm.graph)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True, dynamic=True)(*inputs)
    return graphs[0]


def shape_read_whole() -> Any:
    """Return the settled value of a shape of three sizes, the last of which meets a weight's after it is read."""
    weight = torch.nn.Parameter(torch.ones(16))

    def scaled(x: torch.Tensor) -> torch.Tensor:
        shape = x.size()
        return (x.square() * weight).flatten().view(shape).sum(0)

    graph = capture(scaled, torch.randn(3, 5, 16))
    values = [node.meta.get("example_value") for node in graph.nodes]
    (shape,) = (value for value in values if isinstance(value, tuple) and len(value) == 3)
    return shape


def test_a_size_that_met_a_weights_is_a_number_in_all_values_and_others_are_left() -> None:
    weight = torch.nn.Parameter(torch.ones(16))

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return (x.transpose(0, 1).square() * weight).sum(0)

    graph = capture(scaled, torch.randn(3, 5, 16, requires_grad=True))
    values = {node.name: node.meta["example_value"] for node in graph.nodes if "example_value" in node.meta}
    seen = [value for value in values.values() if isinstance(value, torch.Tensor) and value.dim() == 3]
    assert len(seen) >= 3
    for value in seen:
        assert value.shape[-1] == 16
        assert type(value.shape[-1]) is int
        assert all(isinstance(size, torch.SymInt) for size in value.shape[:2])
        assert value.requires_grad
    x, transposed = seen[:2]
    assert x.untyped_storage()._cdata == transposed.untyped_storage()._cdata


def test_a_shape_that_is_read_whole_before_its_sizes_were_known_has_numbers_too() -> None:
    shape = shape_read_whole()
    assert [type(size) for size in shape] == [torch.SymInt, torch.SymInt, int]


def test_a_shape_that_is_a_node_is_known_where_capture_has_fixed_all_its_sizes() -> None:
    def of_node(value: Any) -> tuple[int, ...] | None:
        node = fx.Graph().placeholder("shape")
        node.meta["example_value"] = value
        return find_settled(node)

    shape = shape_read_whole()
    assert of_node(shape) is None
    assert of_node(shape[2:]) == (16,)
    assert find_settled((shape[2], 4)) == (16, 4)
    assert find_settled((fx.Graph().placeholder("size"), 4)) is None
