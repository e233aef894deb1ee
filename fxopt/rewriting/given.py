"""What a user gives to `fxopt.pattern`, checked: functions, examples, near misses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from fxopt.errors import FxoptError
from fxopt.rewriting.failures import copies_of, cure_of, find_fault, function_place, kinds_of, said_by
from fxopt.rewriting.trees import items_of

Arguments = Sequence[Any]
NearMiss = tuple[Callable[..., Any], Arguments, str]


def check_cases(examples: Iterable[Arguments], subject: str) -> list[tuple[Any, ...]]:
    """Return the examples, each a tuple of arguments with a tensor among them.

    Raises:
        FxoptError: there are none, or one is something else.
    """
    given: list[Any] = (
        [examples] if isinstance(examples, torch.Tensor) else listed(examples, "examples", subject)
    )
    for place, case in enumerate(given):
        if not isinstance(case, tuple | list):
            raise FxoptError(
                f"{subject}: example {place} is a {type(case).__name__}, expected a tuple of arguments\n"
                "give examples=[(x, ...)]"
            )
        tensors = [value for value in items_of(case) if isinstance(value, torch.Tensor)]
        if not tensors:
            raise FxoptError(
                f"{subject}: example {place} has no tensor, expected at least one among the arguments\n"
                "a pattern finds what is computed from tensors; give examples=[(x, ...)]"
            )
        other = next((tensor for tensor in tensors if not _has_values(tensor)), None)
        if other is not None:
            raise FxoptError(
                f"{subject}: example {place}: expected dense tensors that hold values, got one of "
                f"{other.layout} on {other.device}\ngive examples=[(torch.randn(4, 8), ...)]"
            )
    if not given:
        raise FxoptError(
            f"{subject}: no examples, expected at least one tuple of arguments\ngive examples=[(x, ...)]"
        )
    return [tuple(case) for case in given]


def _has_values(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and tensor.layout is torch.strided


def listed(values: Any, what: str, subject: str) -> list[Any]:
    """Return the items of what a user gives as `what`.

    Raises:
        FxoptError: it has none.
    """
    try:
        return list(values)
    except TypeError as error:
        raise FxoptError(
            f"{subject}: expected a list as {what}, got {type(values).__name__}\ngive {what}=[(...), ...]"
        ) from error


def check_near_miss(item: Any, subject: str) -> NearMiss:
    """Return a near miss as it was given: a function, its arguments, a part of the reason to leave it alone.

    Raises:
        FxoptError: it is something else, or the function does not run on the arguments.
    """
    values = items_of(item)
    has_form = len(values) == 3 and callable(values[0]) and isinstance(values[1], tuple | list)
    if not has_form or not isinstance(values[2], str):
        got = f"({kinds_of(values)})" if isinstance(item, tuple | list) else type(item).__name__
        raise FxoptError(
            f"{subject}: expected a near miss as (function, arguments, a part of the reason), got {got}\n"
            "give near_misses=[(function, (x, ...), 'expected abs, got mul')], the arguments as a tuple"
        )
    function, arguments, reason = values[0], items_of(values[1]), values[2]
    fault = find_fault(function, arguments)
    if fault is not None:
        raise FxoptError(f"{subject}: near miss {fault.where}: {fault.wrong}\n{fault.cure}")
    if not any(isinstance(value, torch.Tensor) for value in arguments):
        raise FxoptError(
            f"{subject}: near miss {function_place(function)}: expected a tensor among its arguments, "
            f"got ({kinds_of(arguments)})\na pattern finds what is computed from tensors; give one"
        )
    return function, arguments, reason


def check_arguments(search: Callable[..., Any], cases: Sequence[Arguments], subject: str) -> list[str]:
    """Return the names of the arguments of `search`; every example must give as many."""
    try:
        parameters = inspect.signature(search).parameters
    except ValueError as error:
        raise FxoptError(
            f"{subject}: has no signature, expected a Python function as search\n"
            "write the form as one: def my_form(x): return torch.sinh(x)"
        ) from error
    names = list(parameters)
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise FxoptError(
                f"{subject}: takes any number of arguments as {name}, expected as many as it has names\n"
                "name each argument, and write one pattern for each number of them"
            )
        if parameter.kind is parameter.KEYWORD_ONLY:
            raise FxoptError(
                f"{subject}: takes {name} by its name alone, expected arguments that can be given in order\n"
                "take away the * before it"
            )
    for place, case in enumerate(cases):
        if len(case) != len(names):
            raise FxoptError(
                f"{subject}: example {place} gives {len(case)} arguments, expected {len(names)} ({', '.join(names)})\n"
                "give a value for each argument, defaults too"
            )
    return names


def check_results(
    search: Callable[..., Any], replacement: Callable[..., Any], case: Arguments, name: str
) -> int:
    """Return how many tensors `search` returns; raise unless `replacement` returns such, in shape and dtype too."""
    results: list[tuple[torch.Tensor, ...]] = []
    for function in (search, replacement):
        try:
            with torch.no_grad():
                found: Any = function(*copies_of(case))
        except Exception as error:
            cure = cure_of(error, "both functions take the same arguments; give examples that they accept")
            raise FxoptError(
                f"{name}: {function_place(function, error)} failed on an example: {said_by(error)}\n{cure}"
            ) from error
        results.append(_tensors_of(found, f"{name}: {function_place(function)}"))
    expected, got = (
        [f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" for value in values]
        for values in results
    )
    if expected != got:
        raise FxoptError(
            f"{name}: {function_place(replacement)} returns other values than {function_place(search)}, "
            f"expected {', '.join(expected)}, got {', '.join(got)}\n"
            "return tensors of the same number, shapes and dtypes"
        )
    return len(got)


def _tensors_of(found: Any, subject: str) -> tuple[torch.Tensor, ...]:
    values = items_of(found)
    if not values or not all(isinstance(value, torch.Tensor) for value in values):
        raise FxoptError(
            f"{subject} returns {kinds_of(values)}, expected a tensor or a tuple of tensors\nreturn tensors only"
        )
    return values
