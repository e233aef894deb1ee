"""Sizes that an op needs to be equal are guarded to be, and known to be from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fxopt.graph.arguments import same_size
from fxopt.graph.equal_sizes import equate_sizes
from fxopt.graph.sizes import settle_sizes


def capture(function: Callable[..., Any], *calls: tuple[torch.Tensor, ...]) -> list[fx.Graph]:
    """Return the graphs that `calls` of a function are captured in, all sizes ones that change."""
    graphs: list[fx.Graph] = []

    def keep(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        settle_sizes(gm.graph, equate_sizes(gm.graph))
        graphs.append(gm.graph)
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=keep, fullgraph=True)
    for inputs in calls:
        for tensor in inputs:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        assert torch.allclose(compiled(*inputs), function(*inputs), atol=1e-6)
    return graphs


def values_of(graph: fx.Graph, target: Any) -> list[Any]:
    """Return the values of the arguments of the call of `target`."""
    (node,) = graph.find_nodes(op="call_function", target=target)
    found = [*node.args, *node.kwargs.values()]
    return [item.meta["example_value"] for item in found if isinstance(item, fx.Node)]


def heads(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(1, -1, 2, 4).transpose(1, 2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v))


def rows(number: int) -> torch.Tensor:
    return torch.randn(number, 8)


def test_keys_and_values_of_two_inputs_are_as_long_and_queries_need_not_be() -> None:
    graph, *others = capture(
        attend,
        *((rows(6), rows(length), rows(length)) for length in (9, 7, 6, 5)),
        (rows(3), rows(8), rows(8)),
    )
    assert not others, "lengths that stay equal need one capture"
    q, k, v = values_of(graph, F.scaled_dot_product_attention)
    assert isinstance(k.shape[2], torch.SymInt)
    assert same_size(k.shape[2], v.shape[2])
    assert not same_size(q.shape[2], k.shape[2])


def masked(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    keys = heads(torch.cat([k, k]))
    return F.scaled_dot_product_attention(heads(q), keys, keys, attn_mask=mask)


def test_a_mask_is_as_long_as_keys_are() -> None:
    calls = [(rows(6), rows(length), torch.zeros(1, 2 * length)) for length in (5, 4, 3)]
    first, second = capture(masked, *calls)
    _, k, *_ = values_of(first, F.scaled_dot_product_attention)
    assert k.shape[2] == 10
    assert type(k.shape[2]) is int
    _, k, _, mask = values_of(second, F.scaled_dot_product_attention)
    assert isinstance(k.shape[2], torch.SymInt)
    assert same_size(k.shape[2], mask.shape[1])


def test_a_length_that_a_mask_tells_is_a_number_in_all_that_hangs_on_it() -> None:
    def attend_in_parts(
        q: torch.Tensor, k: torch.Tensor, parts: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        batch = parts.shape[0]
        each = k.shape[0] // batch
        queries, keys = (x.view(batch, -1, 2, 4).transpose(1, 2) for x in (q, k[: batch * each]))
        return F.scaled_dot_product_attention(queries, keys, keys, attn_mask=mask)

    (graph,) = capture(attend_in_parts, (rows(6), rows(20), torch.ones(2), torch.zeros(1, 10)))
    q, k, *_ = values_of(graph, F.scaled_dot_product_attention)
    assert [type(size) for size in k.shape] == [torch.SymInt, int, int, int]
    assert [type(stride) for stride in k.stride()] == [int] * 4
    assert (k.shape[2], k.stride()[0]) == (10, 80)
    assert isinstance(q.shape[2], torch.SymInt)


def test_a_mask_for_any_length_fixes_none() -> None:
    (graph,) = capture(masked, *((rows(6), rows(length), torch.zeros(1, 1)) for length in (5, 4)))
    _, k, *_ = values_of(graph, F.scaled_dot_product_attention)
    assert isinstance(k.shape[2], torch.SymInt)


def test_the_normalized_size_is_that_of_the_weight() -> None:
    weight = torch.nn.Parameter(torch.rand(12))

    def norm(x: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.view(-1, parts.shape[0] * 4), (12,), weight)

    (graph,) = capture(norm, (torch.randn(24), torch.ones(3)), (torch.randn(60), torch.ones(3)))
    x, *_ = values_of(graph, F.layer_norm)
    assert type(x.shape[-1]) is int
    assert x.shape[-1] == 12
    assert isinstance(x.shape[0], torch.SymInt)
