"""Replacements that are right for some sizes only: refused wherever others are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.authoring.check import check_pattern


def squared(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x) ** 2 * 0.5


def first_tile(x: torch.Tensor) -> torch.Tensor:
    y = squared(x)
    return torch.cat((y[:64], torch.zeros_like(y[64:])))


@torch.library.custom_op("fxopt_tests::squared_of_tile", mutates_args=())
def squared_of_tile(x: torch.Tensor) -> torch.Tensor:
    return first_tile(x)


@squared_of_tile.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class OfTile(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return squared_of_tile(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return dy * F.relu(ctx.saved_tensors[0])


def of_tile(x: torch.Tensor) -> torch.Tensor:
    return OfTile.apply(x)  # pyright: ignore[reportReturnType]


def up_to_5000(x: torch.Tensor) -> torch.Tensor:
    return squared(x) if x.shape[0] < 5000 else squared(x) * 1.2


def beyond_5000(x: torch.Tensor) -> torch.Tensor:
    return squared(x) if x.shape[0] >= 5000 else squared(x) * 1.2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.up(x)) ** 2 * 0.5


@pytest.mark.parametrize(
    ("replacement", "sizes", "rewritten"),
    [
        (first_tile, (2, 3, 500), (2, 3)),  # the second is a symbol, guarded to be at most 64
        pytest.param(first_tile, (500, 300), (), marks=pytest.mark.slow),
        (of_tile, (2, 3), (2,)),  # nothing asks for the size
        pytest.param(up_to_5000, (2, 3, 5001), (2, 3), marks=pytest.mark.slow),
        (beyond_5000, (2, 3, 5001), (5001,)),
    ],
)
def test_a_replacement_right_for_some_sizes_is_refused_for_others(
    replacement: Callable[..., torch.Tensor], sizes: tuple[int, ...], rewritten: tuple[int, ...]
) -> None:
    mine = fxopt.pattern(squared, replacement, [(torch.randn(4, 8),)])
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    inputs = [torch.randn(size, 8) for size in sizes]
    stock = [model(x) for x in inputs]
    fxopt.optimize(model, patterns=[mine])
    for x, expected in zip(inputs, stock, strict=True):
        found = model(x)
        found.sum().backward()
        torch.testing.assert_close(found, expected)
        report = fxopt.explain(model)
        assert bool(report.rewrites) == (x.shape[0] in rewritten), x.shape[0]
        assert bool(report.rewrites) != any("error" in miss.reason for miss in report.mismatches)
        assert report.fallbacks == ()


def test_check_pattern_varies_sizes_beyond_those_of_the_examples() -> None:
    wrong = fxopt.pattern(squared, of_tile, [(torch.randn(4, 8),)])
    (failed,) = [finding for finding in check_pattern(wrong) if not finding.holds]
    assert failed.kind == "sizes"
    assert failed.detail.startswith("x: [4, 7] and [1012, 1032]: "), failed.detail
    right = fxopt.pattern(squared, lambda x: x * F.relu(x) * 0.5, [(torch.randn(4, 8),)])
    (told,) = [finding.detail for finding in check_pattern(right) if finding.kind == "sizes"]
    assert told == "proven at x: [4, 7] and [1012, 1032] too"


def by_width(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x.sum(-1, keepdim=True) / x.shape[-1]) * w


class ByNumber(nn.Module):
    """Divides by a number, which is its width or is not."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.w = number, nn.Parameter(torch.randn(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w * torch.tanh(x.sum(-1, keepdim=True) / self.number)


def test_a_size_that_is_a_number_is_that_of_the_model() -> None:
    mine = fxopt.pattern(
        by_width, lambda x, w: torch.tanh(x.mean(-1, keepdim=True)) * w, [(torch.randn(4, 8), torch.randn(8))]
    )
    assert str(mine) == "by_width: mul(tanh(div(sum(x, dim=(-1,)), x.shape[-1])), w)"
    assert [str(finding) for finding in check_pattern(mine) if not finding.holds] == []
    for number, rewritten in ((24, ["by_width"]), (8, [])):
        model = fxopt.optimize(ByNumber(number), patterns=[mine])
        model(torch.randn(3, 24)).sum().backward()
        report = fxopt.explain(model)
        assert [rewrite.pattern for rewrite in report.rewrites] == rewritten
        assert ("expected x.shape[-1] of [3, 24], got 8" in report.why_not("by_width")) == (not rewritten)


def test_a_number_that_is_written_stays_it() -> None:
    mine = fxopt.pattern(
        lambda x: torch.tanh(x) / 8, lambda x: torch.tanh(x) / 8, [(torch.randn(4, 8),)], name="eighth"
    )
    assert str(mine) == "eighth: div(tanh(x), 8)"
