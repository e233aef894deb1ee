"""Patterns from plain PyTorch: what they match, and what each mistake gets."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.authoring.check import check_pattern
from fxopt.errors import FxoptError


def soft_size(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.abs().mean(-1, keepdim=True) + eps)).to(x.dtype) * w


class SoftSize(torch.autograd.Function):
    sign = 1

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        h = x.float()
        root = torch.rsqrt(h.abs().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, w, root)
        return (h * root).to(x.dtype) * w

    @classmethod
    def backward(cls, ctx: Any, dy: torch.Tensor) -> Any:
        x, w, root = ctx.saved_tensors
        h, d = x.float(), (dy * w).float()
        slope = (d * h).sum(-1, keepdim=True) * -0.5 * root**3 * h.sign() / h.shape[-1]
        dw = (dy * (h * root)).flatten(0, -2).sum(0)
        return (d * root + cls.sign * slope).to(x.dtype), dw.to(w.dtype), None


class WrongBackward(SoftSize):
    sign = -1


def fused(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    return SoftSize.apply(x, w, eps)  # pyright: ignore[reportReturnType]


def wrong(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    return WrongBackward.apply(x, w, eps)  # pyright: ignore[reportReturnType]


EXAMPLES = [(torch.randn(2, 4, 8), torch.randn(8), 1e-5)]


class Tower(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(8, 8, dtype=dtype), nn.Parameter(torch.randn(8, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        wide = y.to(torch.float32)
        return self.gain * torch.mul(
            torch.rsqrt(0.25 + torch.mean(torch.abs(wide), dim=-1, keepdim=True)), wide
        ).type_as(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("replacement", [fused, soft_size])
def test_other_spellings_numbers_and_dtypes_are_found(
    dtype: torch.dtype, replacement: Callable[..., Any]
) -> None:
    mine = fxopt.pattern(soft_size, replacement, EXAMPLES)
    model = Tower(dtype)
    x = torch.randn(3, 5, 8, dtype=dtype)
    stock = model(x)
    stock.sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    fxopt.optimize(model, patterns=[*fxopt.patterns.ALL, mine])
    found = model(x)
    found.sum().backward()
    report = fxopt.explain(model)
    assert [rewrite.pattern for rewrite in report.rewrites] == ["soft_size"]
    assert report.fallbacks == ()
    tolerance = dict(rtol=0.02, atol=0.02) if dtype is torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, stock, **tolerance)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **tolerance)


def test_a_wrong_backward_is_refused_by_the_proof() -> None:
    mine = fxopt.pattern(soft_size, wrong, EXAMPLES)
    model = fxopt.optimize(Tower(), patterns=[mine])
    model(torch.randn(3, 8)).sum().backward()
    report = fxopt.explain(model)
    assert report.rewrites == ()
    assert any("gradient" in miss.reason for miss in report.mismatches)
    (failed,) = [finding for finding in check_pattern(mine) if not finding.holds]
    place = f"wrong (test_pattern.py:{wrong.__code__.co_firstlineno})"
    assert f"it matches, and is refused: {place}: gradient of" in failed.detail
    assert failed.detail.endswith("; mend it")


def test_a_pattern_of_several_outputs() -> None:
    def both(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        root = torch.sqrt(x.abs() + y.abs())
        return x / root, y / root

    mine = fxopt.pattern(both, lambda x, y: both(x, y), [(torch.randn(4) + 3, torch.randn(4) + 3)])
    assert [str(finding) for finding in check_pattern(mine) if not finding.holds] == []


def branching(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    return y - 1 if x.sum() > 0 else x


def printing(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    print("y")
    return y - 1


def adding(*xs: torch.Tensor) -> torch.Tensor:
    return xs[0] + xs[1]


def writing(x: torch.Tensor) -> torch.Tensor:
    x = x.view_as(x)
    x.mul_(2)
    return x.exp()


def launching(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("0 active drivers ([]). There should only be one.")  # as Triton does without a GPU


class Growth:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x) - 1


def line_of(function: Callable[..., Any], number: int) -> str:
    """Return the place of a line of `function`, as a regular expression."""
    return rf"\(test_pattern.py:{function.__code__.co_firstlineno + number}\)"


def doubled(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.sqrt(x.abs() + 2 * eps)


def growth(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x) - 1


def idle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.exp(x)


def nothing(x: torch.Tensor) -> torch.Tensor:
    return x


X = torch.randn(4)


def closed_over(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x) * X


odd_pattern: Any = fxopt.pattern
"""The same, for arguments of other types than it takes."""
PLACE = r"\(test_pattern.py:\d+\)"


def raising(x: torch.Tensor) -> torch.Tensor:
    raise KeyError("no such thing")


def silent(x: torch.Tensor) -> None:
    return


MISTAKES: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: fxopt.pattern(branching, growth, [(X,)]),
        rf"branching {line_of(branching, 2)}: cannot be captured, expected one graph of torch ops, got \w+: "
        r".*data-dependent branching.*\nbranch on no value of a tensor: torch.where",
    ),
    (
        lambda: fxopt.pattern(printing, growth, [(X,)]),
        rf"printing {line_of(printing, 2)}: cannot be captured, .*`print`.*\nleave out the print",
    ),
    (
        lambda: fxopt.pattern(writing, growth, [(X,)]),
        rf"writing {line_of(writing, 2)}: cannot be captured, .*in-place.*\nwrite to no argument: make a new",
    ),
    (
        lambda: fxopt.pattern(torch.sinh, torch.cosh, [(X,)]),
        r"sinh: has no signature, expected a Python function as search\nwrite the form as one: def",
    ),
    (
        lambda: odd_pattern(growth, growth, [(X,)], name=3),
        rf"growth {PLACE}: .* an identifier, got 3\ngive name",
    ),
    (
        lambda: fxopt.pattern(functools.partial(growth), growth, [(X,)]),
        rf"growth {PLACE}: expected a name .*, got a function without one\ngive name='my_pattern'",
    ),
    (
        lambda: fxopt.pattern(Growth(), growth, [(X,)]),
        rf"Growth {PLACE}: expected a name .*, got a function without one",
    ),
    (
        lambda: fxopt.pattern(growth, launching, [(X,)]),
        rf"launching {line_of(launching, 1)} failed on an example: RuntimeError: 0 active drivers.*\n"
        "Triton finds no GPU: set TRITON_INTERPRET=1 before Triton is imported",
    ),
    (
        lambda: fxopt.pattern(doubled, doubled, [(X, 0.1)]),
        rf"doubled {PLACE}: computes with the number eps before .*, expected it as it stands\nwrite",
    ),
    (
        lambda: fxopt.pattern(growth, lambda x: x.double(), [(X,)]),
        rf"growth: <lambda> {PLACE} returns other values than growth {PLACE}, "
        r"expected float32\[4\], got float64\[4\]\nreturn",
    ),
    (
        lambda: fxopt.pattern(growth, lambda x: x[:2], [(X,)]),
        r"expected float32\[4\], got float32\[2\]",
    ),
    (
        lambda: fxopt.pattern(growth, lambda x: (x, x), [(X,)]),
        r"expected float32\[4\], got float32\[4\], float32\[4\]",
    ),
    (
        lambda: fxopt.pattern(growth, lambda y, x: x, [(X,)]),
        rf"<lambda> {PLACE} failed on an example: TypeError: .*\nboth functions take the same",
    ),
    (
        lambda: fxopt.pattern(growth, growth, []),
        rf"growth {PLACE}: no examples, expected at least one.*\ngive examples",
    ),
    (
        lambda: fxopt.pattern(growth, growth, [(X, 1)]),
        r"example 0 gives 2 arguments, expected 1 \(x\)\ngive a value",
    ),
    (
        lambda: fxopt.pattern(idle, lambda x, y: torch.exp(x), [(X, X)]),
        rf"idle {PLACE}: does not read y, expected every tensor to be used\ntake",
    ),
    (
        lambda: fxopt.pattern(closed_over, closed_over, [(X,)]),
        rf"closed_over {PLACE}: reads a tensor that is no argument, expected all tensors as arguments\npass it",
    ),
    (
        lambda: fxopt.pattern(nothing, lambda x: x, [(X,)]),
        rf"nothing {PLACE}: (returns something that no op computes|cannot be captured, .* it computes nothing)",
    ),
    (
        lambda: fxopt.pattern(lambda x: x.exp(), torch.exp, [(X,)]),
        r"expected a name that is an identifier, got '<lambda>'\ngive name",
    ),
    (lambda: fxopt.pattern(growth, growth, [(X,)], name="class"), r"an identifier, got 'class'\ngive name"),
    (lambda: odd_pattern(3, growth, [(X,)]), r"expected a function as search, got int\ngive"),
    (
        lambda: fxopt.pattern(torch.nn.SiLU(), growth, [(X,)]),
        r"expected a function as search, got a module, SiLU\nwrite what its forward computes",
    ),
    (
        lambda: fxopt.pattern(adding, growth, [(X, X)]),
        rf"adding {PLACE}: takes any number of arguments as xs, expected .*\nname each argument",
    ),
    (lambda: odd_pattern(growth, None, [(X,)]), r"expected a function as replacement, got NoneType\ngive"),
    (lambda: odd_pattern(growth, growth, [(X,)], check=3), r"expected a function as check, got int\ngive"),
    (lambda: odd_pattern(growth, growth, 3), rf"growth {PLACE}: expected a list as examples, got int\ngive"),
    (
        lambda: odd_pattern(growth, growth, [(X,)], near_misses=3),
        r"expected a list as near_misses, got int\ngive near_misses=",
    ),
    (
        lambda: fxopt.pattern(growth, growth, [(X.to("meta"),)]),
        r"example 0: expected dense tensors that hold values, got one of torch.strided on meta\ngive",
    ),
    (
        lambda: fxopt.pattern(growth, growth, [(torch.eye(4).to_sparse(),)]),
        r"example 0: expected dense tensors that hold values, got one of torch.sparse_coo on cpu\ngive",
    ),
    (
        lambda: odd_pattern(growth, growth, [X]),
        rf"growth {PLACE}: example 0 is a Tensor, expected a tuple of arguments\ngive examples",
    ),
    (lambda: odd_pattern(growth, growth, X), r"example 0 is a Tensor, expected a tuple of arguments\ngive"),
    (
        lambda: fxopt.pattern(lambda a: torch.full((2,), a), growth, [(1.0,)], name="filled"),
        r"example 0 has no tensor, expected at least one among the arguments\na pattern",
    ),
    (
        lambda: fxopt.pattern(lambda x: {"y": x.exp()}, lambda x: {"y": x.exp()}, [(X,)], name="named"),
        rf"named: <lambda> {PLACE} returns dict, expected a tensor or a tuple of tensors\nreturn",
    ),
    (
        lambda: odd_pattern(growth, growth, [(X,)], near_misses=[(growth, (X,))]),
        r"expected a near miss as \(function, arguments, a part of the reason\), got \(function, tuple\)\ngive",
    ),
    (
        lambda: odd_pattern(growth, growth, [(X,)], near_misses=[(growth, X, "a reason")]),
        r"a part of the reason\), got \(function, Tensor, str\)\ngive near_misses=.*, the arguments as a tuple",
    ),
    (
        lambda: fxopt.pattern(growth, growth, [(X,)], near_misses=[(idle, (X,), "a reason")]),
        rf"growth {PLACE}: near miss idle {PLACE}: expected 2 arguments \(x, y\), got 1\ngive a value for each",
    ),
    (
        lambda: fxopt.pattern(growth, growth, [(X,)], near_misses=[(raising, (X,), "a reason")]),
        rf"near miss raising \(test_pattern.py:{raising.__code__.co_firstlineno + 1}\): expected it to run, "
        r"got KeyError: 'no such thing'\nmend the function, or give arguments that it takes",
    ),
    (
        lambda: fxopt.pattern(growth, growth, [(X,)], near_misses=[(silent, (X,), "a reason")]),
        rf"near miss silent {PLACE}: returns .*, expected a tensor or a tuple of tensors, got NoneType\nreturn",
    ),
    (
        lambda: fxopt.pattern(growth, growth, [(X,)], near_misses=[(torch.ones, (4,), "a reason")]),
        r"near miss ones: expected a tensor among its arguments, got \(int\)\na pattern finds",
    ),
]


@pytest.mark.parametrize(("make", "message"), MISTAKES)
def test_mistakes_name_function_line_expected_got_and_cure(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(FxoptError) as error:
        make()
    assert re.search(message, str(error.value)), str(error.value)


def test_integers_and_masks_are_compared_exactly() -> None:
    def buckets(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, (x + 1).clamp(0, 5) * 2, x)

    integers = torch.arange(12).reshape(3, 4)
    cases = [(integers, integers > 4)]
    right = fxopt.pattern(buckets, lambda x, mask: torch.where(mask, 2 * (x + 1).clamp(0, 5), x), cases)
    wrong = fxopt.pattern(buckets, lambda x, mask: torch.where(mask, 2 * (x + 1).clamp(0, 6), x), cases)
    assert [str(finding) for finding in check_pattern(right) if not finding.holds] == []
    assert [finding.kind for finding in check_pattern(wrong) if not finding.holds] == ["example"]


def test_what_no_gradient_flows_through_is_refused() -> None:
    mine = fxopt.pattern(growth, lambda x: torch.expm1(x).detach(), [(X,)])
    (failed,) = [finding for finding in check_pattern(mine) if not finding.holds]
    assert "gradient of x (none: nothing the replacement returns depends on it)" in failed.detail


def test_what_draws_random_numbers_is_refused() -> None:
    """Two runs of it differ, so any replacement would be within twice stock's own error."""

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.1, True) * 2

    mine = fxopt.pattern(noisy, lambda x: torch.nn.functional.dropout(x, 0.1, True) * 2, [(X,)])
    (failed,) = [finding for finding in check_pattern(mine) if not finding.holds]
    assert "the stock code draws random numbers, expected what computes the same each time" in failed.detail


def refuse_all(match: fxopt.Match) -> Any:
    return False


def break_down(match: fxopt.Match) -> Any:
    raise KeyError("no such thing")


def misspell(match: fxopt.Match) -> Any:
    return match["y"]


def misspell_example(match: fxopt.Match) -> Any:
    return match.example("xx")


def misspell_fault(match: fxopt.Match) -> Any:
    return match.fail("it is none", "z")


def run_out_of_library(match: fxopt.Match) -> Any:
    with contextlib.ExitStack() as stack:
        stack.enter_context(match)


class Refusing:
    @torch.no_grad()
    def __call__(self, match: fxopt.Match) -> Any:
        raise KeyError("no such thing")


UNKNOWN = r"UnknownNameError: match of growth: unknown name '{}', expected one of x; mend it"


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (misspell, rf"its check misspell {line_of(misspell, 1)} raised {UNKNOWN.format('y')}"),
        (
            misspell_example,
            rf"its check misspell_example {line_of(misspell_example, 1)} raised {UNKNOWN.format('xx')}",
        ),
        (
            misspell_fault,
            rf"its check misspell_fault {line_of(misspell_fault, 1)} raised {UNKNOWN.format('z')}",
        ),
        (
            run_out_of_library,
            rf"its check run_out_of_library {line_of(run_out_of_library, 2)} raised TypeError: ",
        ),
        (Refusing(), rf"its check Refusing {line_of(inspect.unwrap(Refusing.__call__), 2)} raised KeyError"),
        (
            refuse_all,
            rf"its check refuse_all {PLACE} returned False, expected None or match.fail\(reason, name\)",
        ),
        (
            break_down,
            rf"its check break_down {line_of(break_down, 1)} raised KeyError: 'no such thing'; mend it",
        ),
    ],
)
def test_a_check_that_says_neither_yes_nor_no_is_a_no(check: Callable[[Any], Any], reason: str) -> None:
    mine = fxopt.pattern(growth, torch.expm1, [(X,)], check=check)
    (failed,) = [finding for finding in check_pattern(mine) if not finding.holds]
    assert re.search(reason, failed.detail), failed.detail


def test_partials_and_objects_are_functions_under_a_given_name() -> None:
    for search in (functools.partial(growth), Growth()):
        mine = fxopt.pattern(search, torch.expm1, [(X,)], name="mine")
        assert [str(finding) for finding in check_pattern(mine) if not finding.holds] == []


def on_values(x: torch.Tensor) -> torch.Tensor:
    y = torch.expm1(x)
    if x.sum() > 0:
        return y
    return torch.expm1(x)


def reads_memory(x: torch.Tensor) -> torch.Tensor:
    x.data_ptr()
    return torch.expm1(x)


def raises(x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 3:
        raise ValueError("no 3d")
    return torch.expm1(x)


class Grower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(self.layer(x)) - 1


@pytest.mark.parametrize(
    ("replacement", "line", "told"),
    [
        (
            on_values,
            2,
            r"GuardOnDataDependentSymNode: .*; branch on no value of a tensor: torch.where takes both",
        ),
        (reads_memory, 1, r"RuntimeError: .*data pointer.*; put the kernel into a torch.library.custom_op"),
        (raises, 2, r"ValueError: no 3d; mend it, or give a check that leaves this form out"),
    ],
)
def test_a_replacement_that_cannot_stand_in_a_graph_is_refused_alone(
    replacement: Callable[..., Any], line: int, told: str
) -> None:
    mine = fxopt.pattern(growth, replacement, [(X,)])
    model = nn.Sequential(Grower(), Grower())
    x = torch.randn(2, 3, 8)
    stock = model(x)
    fxopt.optimize(model, patterns=[*fxopt.patterns.ALL, mine])
    found = model(x)
    found.sum().backward()
    report = fxopt.explain(model)
    assert torch.equal(found, stock)
    assert report.fallbacks == ()  # the block itself is captured
    (reason, *_) = [miss.reason for miss in report.mismatches if miss.pattern == "growth"]
    assert re.search(
        rf"replacement {replacement.__name__} {line_of(replacement, line)} raised {told}", reason
    ), reason
