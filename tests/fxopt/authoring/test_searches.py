"""What a search function may hold: what hangs on values is told with its line, what it makes fits any dtype."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.authoring.check import check_pattern
from fxopt.errors import FxoptError
from fxopt.rewriting.pattern import call

X = torch.randn(4, 8)
ON_VALUES = (
    r"reads the values of a tensor, expected ops that return tensors, got item, which returns a number\nkeep"
)
MASKED = r"takes as many items as the values of a tensor say, expected sizes that follow .*, got getitem, .*\nkeep all"
FOLDED = r"has no canonical form, expected an op that torch has as a function, got {}\nwrite the arithmetic"


def scaled(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    return y * y.max().item()


def cut(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    number = int(y.sum())
    return y[: number % 3 + 1]


def listed(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    return y * y.sum(0).tolist()[0]


def masked(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    return y[y > 1] * 2


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 2


def wrapped(x: torch.Tensor) -> Any:
    y = x.exp()
    return Double.apply(y)


def twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.exp()
    return y, y


def named(x: torch.Tensor, *, scale: float) -> torch.Tensor:
    return x.exp() * scale


@pytest.mark.parametrize(
    ("search", "line", "message"),
    [
        (scaled, 2, ON_VALUES),
        (cut, 2, ON_VALUES),
        (
            listed,
            2,
            r"cannot be captured, .*tolist.*\nkeep it a tensor, or leave it out of the search and take",
        ),
        (masked, 2, MASKED),
        (wrapped, 2, FOLDED.format("autograd_function_apply")),
        (
            twice,
            0,
            r"returns a value twice, or an argument, expected 2 values that ops compute, got 1\nreturn each",
        ),
        (
            named,
            0,
            r"takes scale by its name alone, expected arguments that can be given in order\ntake away",
        ),
    ],
)
def test_what_no_pattern_can_find_is_told_with_its_line(
    search: Callable[..., Any], line: int, message: str
) -> None:
    case = (X, 2.0) if search is named else (X,)
    with pytest.raises(FxoptError) as error:
        fxopt.pattern(search, search, [case])
    place = rf"\(test_searches.py:{search.__code__.co_firstlineno + line}\)"
    assert re.search(rf"{search.__name__} {place}: {message}", str(error.value)), str(error.value)


def leaky(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, torch.zeros_like(x), x.sinh())


class Leaky(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return leaky(self.layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_search_makes_is_of_the_models_dtype(dtype: torch.dtype) -> None:
    mine = fxopt.pattern(leaky, lambda x: torch.clamp(x, max=0).sinh(), [(X,)])
    model = fxopt.optimize(Leaky(dtype), patterns=[mine])
    model(X.to(dtype)).sum().backward()
    assert [rewrite.pattern for rewrite in fxopt.explain(model).rewrites] == ["leaky"]


def test_an_op_that_bfloat16_lacks_may_be_searched() -> None:
    def loudness(x: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft(x).abs()

    mine = fxopt.pattern(loudness, lambda x: loudness(x), [(X,)])
    assert [str(finding) for finding in check_pattern(mine) if not finding.holds] == []


def growth(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x) - 1


def test_a_replacement_that_returns_no_tensor_is_refused() -> None:
    search = fxopt.pattern(growth, torch.expm1, [(X,)]).search
    mine = fxopt.Pattern("mine", search, lambda match: call(pair, match["x"]))
    model = fxopt.optimize(nn.Sequential(nn.Linear(8, 8), Growth()), patterns=[mine])
    model(X).sum().backward()
    reasons = [miss.reason for miss in fxopt.explain(model).mismatches]
    place = rf"pair \(test_searches.py:{pair.__code__.co_firstlineno}\)"
    told = f"replacement {place} returned Tensor, Tensor for one output, expected a tensor; return one"
    assert any(re.search(told, reason) for reason in reasons), reasons


def pair(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.expm1(x), x


class Growth(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return growth(x)
