"""What a graph launches and saves: counted by hand on small graphs, and the same on every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxopt.graph.work import ambient_autocast, kept_for_work, measure_work
from fxopt.kernels.glu.op import glu
from fxopt.report.records import Work
from fxopt.rewriting.functions import capture

ITEM = 4


def graph_of(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    return capture(function, inputs)[0]


def leaf(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, device=device, requires_grad=True)


def test_kernels_and_saved_bytes_are_those_counted_by_hand() -> None:
    gm = graph_of(lambda x, y: torch.sigmoid(torch.exp(x) * y.t()), leaf(4, 8), leaf(8, 4))
    # exp, mul, sigmoid; t is a view. Saved: exp's result (for exp and mul) and sigmoid's; y is the graph's own.
    # Backward: sigmoid_backward, two products of mul, one of exp.
    assert measure_work(gm) == Work(3, 4, 2 * 4 * 8 * ITEM)


def test_what_needs_no_gradient_is_not_saved() -> None:
    gm = graph_of(lambda x: torch.exp(x) * 2, torch.randn(4, 8))
    assert measure_work(gm) == Work(2, 0, 0)


def gated(*, doubled: bool) -> fx.GraphModule:
    """Return the graph of the square of a gated unit, as a rewrite leaves it: of two inputs, or of one doubled."""
    graph = fx.Graph()
    gate, up = graph.placeholder("gate"), graph.placeholder("up")
    for node in (gate, up):
        node.meta["example_value"] = leaf(4, 8)
    first = graph.call_function(torch.mul, (gate, 2)) if doubled else gate
    unit = graph.call_function(glu, (first, up), {"act": "silu"})
    graph.output((graph.call_function(torch.square, (unit,)),))
    return fx.GraphModule({}, graph)


def test_what_one_op_computes_again_from_inputs_is_not_kept() -> None:
    """It is one launch more in backward, as what fxopt compiles has it; made from other values it is kept."""
    again, kept = measure_work(gated(doubled=False)), measure_work(gated(doubled=True))
    assert again is not None
    assert kept is not None
    assert again.saved_bytes == 0
    assert kept.saved_bytes == 2 * 4 * 8 * ITEM  # gate * 2, and what is squared
    # The doubled one's other launch is the product's own backward.
    assert again.backward_kernels == kept.backward_kernels


def test_what_is_computed_only_where_it_is_read_is_left_out() -> None:
    gm = graph_of(lambda x: (torch.exp(x).sum(), torch.tanh(x)), leaf(4, 8))
    whole = measure_work(gm)
    next(node for node in gm.graph.nodes if "tanh" in node.name).meta["kept"] = True
    lazy = measure_work(gm)
    assert whole is not None
    assert lazy is not None
    assert whole.saved_bytes - lazy.saved_bytes == 4 * 8 * ITEM
    assert whole.forward_kernels - lazy.forward_kernels == 1
    assert len(gm.graph.find_nodes(op="output")[0].args[0]) == 2, "the graph itself stays as it is"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("grouped", [False, True])
def test_stock_attention_keeps_no_matrix_of_weights(device: str, grouped: bool) -> None:
    """On the meta device torch would take the unfused form, and a report would praise itself for it."""
    length, heads = 64, 2 if grouped else 4
    query, key, value = (leaf(1, count, length, 8, device=device) for count in (4, heads, heads))
    gm = graph_of(
        lambda q, k, v: F.scaled_dot_product_attention(q * 2, k, v, is_causal=True, enable_gqa=grouped),
        query,
        key,
        value,
    )
    work = measure_work(gm)
    assert work is not None
    assert work.saved_bytes < 4 * length * length * ITEM


def test_attention_to_values_of_another_width_is_measured() -> None:
    query, key = (leaf(1, 4, 64, 8, device="meta") for _ in range(2))
    value = leaf(1, 4, 64, 6, device="meta")

    work = measure_work(
        graph_of(lambda q, k, v: F.scaled_dot_product_attention(q * 2, k, v) * v, query, key, value)
    )
    assert work is not None
    assert work.saved_bytes < 4 * 64 * 64 * ITEM


def test_what_cannot_run_so_is_not_known() -> None:
    gm = graph_of(lambda x: torch.exp(x), leaf(4))
    next(node for node in gm.graph.nodes if "exp" in node.name).target = torch.unique_consecutive
    gm.recompile()
    assert measure_work(gm) is None


def test_a_graph_runs_under_the_autocast_that_it_was_captured_under() -> None:
    gm = graph_of(lambda x, w: torch.tanh(F.linear(x, w)), leaf(4, 8), leaf(16, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = ambient_autocast()
    full, half = measure_work(gm), measure_work(gm, state)
    assert full is not None
    assert half is not None
    assert full.saved_bytes == 4 * 16 * ITEM
    assert half.saved_bytes == (4 * 16 + 4 * 8 + 16 * 8) * 2, "tanh's result, and x and w as they were cast"
    assert half.forward_kernels == full.forward_kernels + 2


def test_a_graph_that_fails_leaves_the_modes_alone() -> None:
    def switched(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.exp(x @ x)

    gm = graph_of(switched, leaf(4, 4))
    next(node for node in gm.graph.nodes if node.name.startswith("exp")).target = torch.unique_consecutive
    gm.recompile()
    assert measure_work(gm) is None
    assert not torch.is_autocast_enabled("cpu")


def test_a_copy_keeps_bodies_that_are_rewritten_later() -> None:
    inner = graph_of(lambda x: torch.exp(x), leaf(4))
    root = torch.nn.Module()
    root.body = inner
    graph = fx.Graph()
    body = graph.get_attr("body")
    graph.output(body)
    copy = kept_for_work(fx.GraphModule(root, graph))()
    for node in inner.graph.nodes:
        if node.target is torch.exp:
            node.target = torch.tanh
    targets = [node.target for node in copy.body.graph.nodes]  # pyright: ignore
    assert torch.tanh not in targets
