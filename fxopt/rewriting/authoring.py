"""Patterns from plain PyTorch: a function to find, a function to put in its place, and arguments to try both on.

The function to find is captured and brought to canonical form, as models are, and its graph becomes the pattern:
operands may stand in either order, every known spelling is the same, casts that it writes are there or not, sizes
are free, and numbers that are arguments may be any.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.errors import FxoptError
from fxopt.graph.canonicalize import canonicalize
from fxopt.graph.names import op_name
from fxopt.graph.verify import note_placeholders
from fxopt.rewriting.failures import KEEP_A_TENSOR, cure_of, function_place, node_place, said_by
from fxopt.rewriting.functions import bind_numbers, capture
from fxopt.rewriting.given import (
    Arguments,
    NearMiss,
    check_arguments,
    check_cases,
    check_near_miss,
    check_results,
    listed,
)
from fxopt.rewriting.graph_terms import GraphTerms
from fxopt.rewriting.own_sizes import Sizes, find_sizes, grown, with_sizes
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call, check_pattern_name
from fxopt.rewriting.trees import items_of, names_in

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
FIRST_MARK, STEP = 0.7390851332151607, 0.0137
"""What stands for a number while the function is captured: nobody writes these."""


def pattern(
    search: Callable[..., Any],
    replacement: Callable[..., Any],
    examples: Iterable[Arguments],
    *,
    name: str = "",
    near_misses: Iterable[NearMiss] = (),
    check: Callable[[Match], Mismatch | None] | None = None,
) -> Pattern:
    """Return the pattern that finds what `search` computes and puts a call of `replacement` there.

    Both take the same arguments. Those that are tensors in the examples may be any tensor, those that are floats any
    number; all others are fixed as they are in the first example. `replacement` may be any differentiable function:
    an op, a `torch.autograd.Function`, a kernel in a `torch.library.custom_op`; it gets autograd's backward or has its
    own, and is proven with it wherever it is used.

    Args:
        search: the eager code to find, of torch ops; returns a tensor or a tuple of tensors.
        replacement: what comes in its place, with outputs of the same number, shapes and dtypes.
        examples: tuples of arguments, small ones; the first is what `search` is captured on.
        name: what reports and `disable` call it; the name of `search` otherwise.
        near_misses: functions that resemble `search` and must be left alone, arguments, a part of the reason.
        check: returns None, or `match.fail(reason, name)` where the form fits and the replacement does not serve it.

    Raises:
        FxoptError: `search` cannot be captured as one graph, a number does not reach an op as it stands, or
            `replacement` returns something else.

    >>> def growth(x):
    ...     return torch.exp(x) - 1
    >>> print(pattern(growth, torch.expm1, [(torch.randn(4),)]))
    growth: sub(exp(x), 1)
    """
    for what, function in (("search", search), ("replacement", replacement), ("check", check)):
        if not callable(function) and not (function is None and what == "check"):
            cure = "fxopt.pattern(search, replacement, examples=[(x, ...)])"
            if what == "check":
                cure = "check=function, which takes a match and returns it or a Mismatch, or leave it out"
            raise FxoptError(
                f"pattern: expected a function as {what}, got {type(function).__name__}\ngive {cure}"
            )
    if isinstance(search, torch.nn.Module):
        raise FxoptError(
            f"pattern: expected a function as search, got a module, {type(search).__name__}\n"
            "write what its forward computes as one, weights as arguments: def my_form(x, w): return torch.sinh(x) * w"
        )
    given: Any = name or getattr(search, "__name__", None)
    check_pattern_name(given, function_place(search), "a function without one")
    name, subject = given, f"{given}: {function_place(search)}"
    cases = check_cases(examples, subject)
    near = [check_near_miss(item, subject) for item in listed(near_misses, "near_misses", subject)]
    names = check_arguments(search, cases, subject)
    (number, *_) = [check_results(search, replacement, case, name) for case in cases]
    first = cases[0]
    gm, order = _capture(search, first, subject)
    sizes = _find_sizes(search, first, names, gm, subject)
    tensors = [names[place] for place in order]
    terms = GraphTerms(gm, tensors, _marks(first, names), sizes, search, name).terms()
    outputs, op = len(terms), _named(replacement, name)
    if outputs != number:
        raise FxoptError(
            f"{subject}: returns a value twice, or an argument, expected {number} values that ops compute, "
            f"got {outputs}\nreturn each value once, and no argument"
        )
    bound = {key for term in terms for key in names_in(term)}
    unread = [
        key
        for key, value in zip(names, first, strict=True)
        if isinstance(value, torch.Tensor) and key not in bound
    ]
    if unread:
        raise FxoptError(
            f"{subject}: does not read {unread[0]}, expected every tensor to be used\ntake the argument away"
        )

    def replace(match: Match) -> Call | tuple[Call, ...]:
        values = [match[key] if key in bound else value for key, value in zip(names, first, strict=True)]
        result = call(op, *values)
        if outputs == 1:
            return result
        return tuple(call(operator.getitem, result, place) for place in range(outputs))

    def yield_examples(device: torch.device) -> Iterator[tuple[str, Example]]:
        for place, case in enumerate(cases):
            yield f"example {place}", bind_numbers(search, case, device)

    def yield_near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
        for function, inputs, reason in near:
            yield getattr(function, "__name__", "near miss"), bind_numbers(function, inputs, device), reason

    check = with_sizes(check, sorted({size for operands in sizes.values() for size in operands.values()}))
    optional: dict[str, Any] = {} if check is None else {"check": check}
    return Pattern(
        name,
        search=lambda: terms if outputs > 1 else terms[0],
        replace=replace,
        examples=yield_examples,
        near_misses=yield_near_misses,
        source=function_place(search),
        **optional,
    )


def _capture(search: Callable[..., Any], case: Arguments, subject: str) -> tuple[fx.GraphModule, list[int]]:
    """Return the canonical graph of `search` and the place among the arguments of each placeholder."""
    places = [place for place, value in enumerate(case) if isinstance(value, torch.Tensor)]
    given = [FIRST_MARK + STEP * i if isinstance(value, float) else value for i, value in enumerate(case)]
    function, inputs = bind_numbers(search, given, torch.device("cpu"))
    try:
        gm, values, inputs = _capture_narrow(function, inputs)
    except Exception as error:
        name = subject.partition(":")[0]
        cure = cure_of(error, "leave out data-dependent branches, prints and calls into other libraries")
        raise FxoptError(
            f"{name}: {function_place(search, error)}: cannot be captured, expected one graph of torch ops, "
            f"got {said_by(error)}\n{cure}"
        ) from error
    _check_values_unread(gm, search, subject.partition(":")[0])
    note_placeholders(gm)
    canonicalize(gm)
    place_of = {id(value): place for value, place in zip(inputs, places, strict=True)}
    if any(id(value) not in place_of for value in values):
        raise FxoptError(
            f"{subject}: reads a tensor that is no argument, expected all tensors as arguments\n"
            "pass it as one more argument"
        )
    return gm, [place_of[id(value)] for value in values]


def _capture_narrow(
    function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]
) -> tuple[fx.GraphModule, tuple[Any, ...], tuple[torch.Tensor, ...]]:
    """Return the graph of `function`, what its placeholders hold, and the inputs that it was captured on.

    Those in float32 are taken in bfloat16, for casts show themselves in a narrow dtype only, unless it has an op that
    bfloat16 lacks.
    """
    if {value.dtype for value in inputs if value.is_floating_point()} == {torch.float32}:
        narrow = tuple(
            value.detach().bfloat16().requires_grad_() if value.is_floating_point() else value
            for value in inputs
        )
        with contextlib.suppress(Exception):  # what is wrong in float32 too is told below
            return *capture(function, narrow), narrow
    return *capture(function, inputs), inputs


def _check_values_unread(gm: fx.GraphModule, search: Callable[..., Any], name: str) -> None:
    """Raise where a number or a size in a graph of fixed sizes hangs on the values of a tensor."""
    for node in gm.graph.nodes:
        results = items_of(node.meta.get("example_value"))
        if any(isinstance(result, SYMBOLS) for result in results):
            raise FxoptError(
                f"{name}: {node_place(search, node)}: reads the values of a tensor, expected ops that return tensors, "
                f"got {op_name(node)}, which returns a number\n{KEEP_A_TENSOR}"
            )
        shapes = [result.shape for result in results if isinstance(result, torch.Tensor)]
        if any(isinstance(size, SYMBOLS) for shape in shapes for size in shape):
            raise FxoptError(
                f"{name}: {node_place(search, node)}: takes as many items as the values of a tensor say, expected "
                f"sizes that follow from those of the arguments, got {op_name(node)}, whose size does not\n"
                "keep all items: torch.where takes those that a condition chooses"
            )


def _find_sizes(
    search: Callable[..., Any], case: Arguments, names: Sequence[str], gm: fx.GraphModule, subject: str
) -> Sizes:
    """Return which numbers in the graph of `search` are sizes, none where it takes no larger arguments."""
    larger = grown(case)
    if larger is None:
        return {}
    try:
        other, _ = _capture(search, larger, subject)
    except FxoptError:
        return {}
    tensors = [
        (name, tuple(value.shape), tuple(big.shape))
        for name, value, big in zip(names, case, larger, strict=True)
        if isinstance(value, torch.Tensor)
    ]
    return find_sizes(gm, other, tensors)


def _marks(case: Arguments, names: Sequence[str]) -> dict[float, str]:
    floats = (place for place, value in enumerate(case) if isinstance(value, float))
    return {FIRST_MARK + STEP * place: names[place] for place in floats}


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return `function`, under `name` where it has none that a graph can call it by."""
    if getattr(function, "__name__", "").isidentifier():
        return function

    def run(*args: Any) -> Any:
        return function(*args)

    run.__name__ = run.__qualname__ = name
    run.__dict__["__wrapped__"] = function
    return run
