"""Parts of a larger value are saved as copies where the whole would stay alive for them alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.capture import torch_lowering
from fxopt.demo.training import count_saved_bytes

ROWS, WIDTH = 16, 8
PART = ROWS * WIDTH * 4


def third_alone(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    a, b, c = (x + 1).chunk(3, -1)
    return (a.tanh() + b + c * w,)


def all_thirds(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    a, b, c = (x + 1).chunk(3, -1)
    return (a * w + b * w + c * w,)


def whole_is_returned(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    whole = x + 1
    return whole, whole.chunk(3, -1)[2] * w


@pytest.mark.parametrize(
    ("function", "expected"),
    [(third_alone, 3 * PART), (all_thirds, 4 * PART), (whole_is_returned, 4 * PART)],
    ids=["third alone", "all thirds", "whole is returned"],
)
def test_what_is_saved(function: Callable[..., tuple[torch.Tensor, ...]], expected: int) -> None:
    """Of x + 1, tanh and w: one part with what was computed of another, or the whole where it lives anyway."""
    x = torch.randn(ROWS, 3 * WIDTH, requires_grad=True)
    w = torch.randn(ROWS, WIDTH, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=torch_lowering.plain_backend, fullgraph=True)
    with count_saved_bytes(torch.nn.Module()) as saved:
        results = compiled(x, w)
    assert saved.total == expected
    ours, stock = (torch.autograd.grad([y.sum() for y in each], (x, w)) for each in (results, function(x, w)))
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


def test_weights_that_lie_in_one_tensor_are_not_copied() -> None:
    """As an engine lays them that trains parts of all: each is a small part of it, and all of it lives anyway."""
    flat = torch.randn(8 * WIDTH, WIDTH)
    weights = [nn.Parameter(torch.empty(0)) for _ in range(8)]
    for weight, part in zip(weights, flat.chunk(8), strict=True):
        weight.data = part
    x = torch.randn(ROWS, WIDTH, requires_grad=True)

    def stock(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w).tanh()

    torch._dynamo.reset()
    compiled = torch.compile(stock, backend=torch_lowering.plain_backend, fullgraph=True)
    with count_saved_bytes(nn.ParameterList(weights)) as saved:
        result = compiled(x, weights[3])
    assert saved.total == 2 * PART, "x and tanh"
    ours, theirs = (torch.autograd.grad(y.sum(), (x, weights[3])) for y in (result, stock(x, weights[3])))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_sizes_that_change_are_left_alone() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(third_alone, backend=torch_lowering.plain_backend, fullgraph=True, dynamic=True)
    for rows in (ROWS, 5):
        x = torch.randn(rows, 3 * WIDTH, requires_grad=True)
        w = torch.randn(rows, WIDTH, requires_grad=True)
        ours, stock = (torch.autograd.grad(call(x, w)[0].sum(), (x, w)) for call in (compiled, third_alone))
        assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))
