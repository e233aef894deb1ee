"""Ops that write over arguments: only where nobody reads these any more, and with the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.capture.in_place import write_in_place
from fxopt.kernels.glu.form import Form

ATTRIBUTES = Form("silu").astuple()
ops = torch.ops.fxopt


def gradients(dy: Tensor, gate: Tensor, up: Tensor | None, *, needed: bool = True) -> Any:
    return ops.glu_backward(dy, gate, up, *ATTRIBUTES, True, needed)


def all_dead(dy: Tensor, x: Tensor) -> Any:
    dgate, dup = gradients(dy * 2, x.sin(), x.cos())
    return dgate.exp(), dup + 1


def with_value(dy: Tensor, x: Tensor) -> Any:
    found = ops.glu_backward_output(dy * 2, x.sin(), x.cos(), *ATTRIBUTES, True, True)
    return found[0].exp(), found[1] + found[2]


def value_beside_given(dy: Tensor, x: Tensor) -> Any:
    found = ops.glu_backward_output(dy * 2, x, x.cos(), *ATTRIBUTES, True, True)
    return found[0].exp(), found[1] + found[2]


def packed(dy: Tensor, x: Tensor) -> Any:
    both = torch.cat([x, x.cos()], -1)
    found = ops.glu_backward(dy * 2, both, None, *Form("silu", layout="packed").astuple(), True, True)
    return found[0].exp()


def given(dy: Tensor, x: Tensor) -> Any:
    dgate, dup = gradients(dy * 2, x, x.cos())
    return dgate.exp(), dup + 1


def read_later(dy: Tensor, x: Tensor) -> Any:
    gate = x.sin()
    dgate, dup = gradients(dy * 2, gate, x.cos())
    return dgate.exp(), dup + gate


def viewed_and_read_later(dy: Tensor, x: Tensor) -> Any:
    gate = x.sin()
    part = gate.view(-1)[2:4]
    dgate, dup = gradients(dy * 2, gate, x.cos())
    return dgate.exp(), dup.sum() + part


def returned(dy: Tensor, x: Tensor) -> Any:
    gate = x.sin()
    dgate, dup = gradients(dy * 2, gate, x.cos())
    return dgate.exp(), dup + 1, gate


def one_for_both(dy: Tensor, x: Tensor) -> Any:
    gate = x.sin()
    dgate, dup = gradients(dy * 2, gate, gate)
    return dgate.exp(), dup + 1


def part_of_a_whole(dy: Tensor, x: Tensor) -> Any:
    gate = torch.cat([x, x])[: x.shape[0]]
    dgate, dup = gradients(dy * 2, gate, x.cos())
    return dgate.exp(), dup + 1


def nothing_dead(dy: Tensor, x: Tensor) -> Any:
    dgate, dup = gradients(dy, x, x.cos())
    return dgate.exp(), dup + 1


def one_gradient(dy: Tensor, x: Tensor) -> Any:
    return gradients(dy * 2, x.sin(), x.cos(), needed=False)[0].exp()


def run(function: Callable[..., Any]) -> tuple[list[str], Any, Any]:
    """Return which forms of `function` stand after the pass, and its results before and after."""
    torch.manual_seed(0)
    inputs = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    gm: fx.GraphModule = make_fx(function, tracing_mode="fake")(*inputs)
    count = write_in_place(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    names = [
        str(node.target).split(".")[1] for node in gm.graph.nodes if str(node.target).startswith("fxopt.")
    ]
    forms = [name for name in names if "_over_" in name]
    assert len(forms) == count
    return forms, function(*inputs), gm(*inputs)


@pytest.mark.parametrize(
    ("function", "form"),
    [
        (all_dead, "glu_backward_over_all"),
        (with_value, "glu_backward_output_over_all"),
        (value_beside_given, "glu_backward_output_over_dy"),
        (packed, "glu_backward_over_all"),
        (given, "glu_backward_over_dy"),
        (read_later, "glu_backward_over_dy"),
        (viewed_and_read_later, "glu_backward_over_dy"),
        (returned, "glu_backward_over_dy"),
        (one_for_both, "glu_backward_over_dy"),
        (part_of_a_whole, "glu_backward_over_all"),
        (nothing_dead, None),
        (one_gradient, None),
    ],
)
def test_only_what_nobody_reads_any_more_is_written_over(function: Any, form: str | None) -> None:
    forms, before, after = run(function)
    assert forms == ([] if form is None else [form])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
