"""Patterns from plain PyTorch: a function to find, a function to put in its place, and arguments to try both on.

The function to find is captured and brought to canonical form, as models are, and its graph becomes the pattern:
operands may stand in either order, every known spelling is the same, casts that it writes are there or not, sizes
are free, and numbers that are arguments may be any.
"""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxopt.errors import FxoptError
from fxopt.graph import vocabulary
from fxopt.graph.canonicalize import canonicalize
from fxopt.graph.verify import note_placeholders
from fxopt.graph.view import results_of
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call, walk
from fxopt.rewriting.terms import Operation, Term, downcast, maybe, number, operation, tensor, upcast

FREE = {vocabulary.reshape: "shape", vocabulary.expand: "shape"}
"""Attributes that hold sizes: a pattern fits any."""
FIRST_MARK, STEP = 0.7390851332151607, 0.0137
"""What stands for a number while the function is captured: nobody writes these."""

Arguments = Sequence[Any]
NearMiss = tuple[Callable[..., Any], Arguments, str]


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
    an op, a `torch.autograd.Function`, a kernel behind `torch.library`; it gets autograd's backward or has its own,
    and is proven with it wherever it is used.

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
    name = name or getattr(search, "__name__", "")
    cases = [tuple(case) for case in examples]
    subject = f"{name}: {_place(search)}"
    if not name.isidentifier():
        raise FxoptError(
            f"{name or 'pattern'}: expected a name that is an identifier, got {name!r}\ngive name='my_pattern'"
        )
    if not cases:
        raise FxoptError(
            f"{subject}: no examples, expected at least one tuple of arguments\ngive examples=[(x, ...)]"
        )
    names = _parameters(search, cases, subject)
    for case in cases:
        _compare(search, replacement, case, name)
    first = cases[0]
    gm, order = _capture(search, first, subject)
    terms = _Terms(gm, [names[place] for place in order], _marks(first, names), subject).terms()
    outputs, op = len(terms), _named(replacement, name)
    bound = {key for term in terms for key in _names_in(term)}
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

    near = [(function, tuple(inputs), reason) for function, inputs, reason in near_misses]

    def yield_examples(device: torch.device) -> Iterator[tuple[str, Example]]:
        for place, case in enumerate(cases):
            yield f"example {place}", bind_numbers(search, case, device)

    def yield_near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
        for function, inputs, reason in near:
            yield getattr(function, "__name__", "near miss"), bind_numbers(function, inputs, device), reason

    optional: dict[str, Any] = {} if check is None else {"check": check}
    return Pattern(
        name,
        search=lambda: terms if outputs > 1 else terms[0],
        replace=replace,
        examples=yield_examples,
        near_misses=yield_near_misses,
        source=_place(search),
        **optional,
    )


def bind_numbers(function: Callable[..., Any], case: Arguments, device: torch.device) -> Example:
    """Return `function` as one of tensors alone, and these on `device`; floats need a gradient."""
    places = [place for place, value in enumerate(case) if isinstance(value, torch.Tensor)]
    tensors = tuple(
        case[place].detach().to(device).requires_grad_(case[place].is_floating_point()) for place in places
    )

    @functools.wraps(function)
    def run(*given: torch.Tensor) -> Any:
        values = list(case)
        for place, value in zip(places, given, strict=True):
            values[place] = value
        return function(*values)

    return run, tensors


class _Captured(Exception):
    """Carries what the captured graph was called with."""


def capture(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor]
) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """Return the one graph that `function` is captured as, and the value that each of its placeholders has.

    Raises:
        Exception: Dynamo's, where there is no such graph.
    """
    graphs: list[fx.GraphModule] = []

    def remember(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)

        def leave(*args: Any) -> Any:
            raise _Captured(args)

        return leave

    def entry(*given: torch.Tensor) -> Any:
        return function(*given)

    # A code object of its own: Dynamo's limits count by code.
    own = types.FunctionType(entry.__code__.replace(), entry.__globals__, "entry", None, entry.__closure__)
    compiled: Any = torch.compile(own, backend=remember, fullgraph=True, dynamic=False)
    try:
        compiled(*inputs)
    except _Captured as reached:
        return graphs[-1], reached.args[0]
    raise RuntimeError("it computes nothing from its tensors")


def _capture(search: Callable[..., Any], case: Arguments, subject: str) -> tuple[fx.GraphModule, list[int]]:
    """Return the canonical graph of `search` and the place among the arguments of each placeholder."""
    places = [place for place, value in enumerate(case) if isinstance(value, torch.Tensor)]
    given = [FIRST_MARK + STEP * i if isinstance(value, float) else value for i, value in enumerate(case)]
    function, inputs = bind_numbers(search, given, torch.device("cpu"))
    floats = {value.dtype for value in inputs if value.is_floating_point()}
    if floats == {torch.float32}:  # casts show themselves in a narrow dtype only
        inputs = tuple(
            value.detach().bfloat16().requires_grad_() if value.is_floating_point() else value
            for value in inputs
        )
    try:
        gm, values = capture(function, inputs)
    except Exception as error:
        text = next((line for line in str(error).splitlines() if line.strip()), "")
        raise FxoptError(
            f"{subject}: cannot be captured, expected one graph of torch ops, got {type(error).__name__}: {text}\n"
            "leave out data-dependent branches, prints and calls into other libraries"
        ) from error
    note_placeholders(gm)
    canonicalize(gm)
    place_of = {id(value): place for value, place in zip(inputs, places, strict=True)}
    if any(id(value) not in place_of for value in values):
        raise FxoptError(
            f"{subject}: reads a tensor that is no argument, expected all tensors as arguments\n"
            "pass it as one more argument"
        )
    return gm, [place_of[id(value)] for value in values]


class _Terms:
    """Turns a canonical graph into terms; a node that is read twice is one term."""

    def __init__(
        self, gm: fx.GraphModule, names: Sequence[str], marks: dict[float, str], subject: str
    ) -> None:
        self._gm, self._marks, self._subject = gm, marks, subject
        holes = gm.graph.find_nodes(op="placeholder")
        self._terms: dict[fx.Node, Term] = {
            node: tensor(name) for node, name in zip(holes, names, strict=True)
        }
        self._found: set[str] = set()

    def terms(self) -> tuple[Term, ...]:
        """Return one term per output.

        Raises:
            FxoptError: an output is an input, an op is one that patterns cannot see, a number was computed with.
        """
        outputs = tuple(self._value(result) for result in results_of(self._gm))
        for output in outputs:
            if not isinstance(output, Term) or not output.heads:
                raise FxoptError(
                    f"{self._subject}: returns something that no op computes, expected results of ops only\n"
                    "return what is computed"
                )
        for name in self._marks.values():
            if name not in self._found:
                raise FxoptError(
                    f"{self._subject}: computes with the number {name} before an op reads it, "
                    "expected it as it stands\n"
                    f"write the number that the op reads as an argument, or {name} as an int to fix it"
                )
        return outputs

    def _value(self, item: Any) -> Any:
        match item:
            case fx.Node():
                if item not in self._terms:
                    self._terms[item] = self._operation(item)
                return self._terms[item]
            case tuple() | list():
                return tuple(map(self._value, item))
            case float() if item in self._marks:
                self._found.add(self._marks[item])
                return number(self._marks[item])
            case _:
                return item

    def _operation(self, node: fx.Node) -> Term:
        if node.op != "call_function":
            raise FxoptError(
                f"{self._subject}: .{node.target}() has no canonical form, expected ops of torch\n"
                "call it as a function of torch instead of a method"
            )
        args = tuple(map(self._value, node.args))
        if node.target is vocabulary.cast:
            return _optional_cast(node, args[0])
        attributes = {
            key: ... if FREE.get(node.target) == key else self._value(value)
            for key, value in node.kwargs.items()
        }
        return operation(node.target, *args, **attributes)


def _optional_cast(node: fx.Node, inner: Term) -> Term:
    """Return a term for a cast that models of other dtypes do without, or for one that changes the kind of value."""
    before, after = node.args[0].meta["example_value"].dtype, node.kwargs["dtype"]  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
    if not (before.is_floating_point and after.is_floating_point):  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue, reportOptionalMemberAccess]
        return operation(vocabulary.cast, inner, dtype=after)
    is_wider = torch.promote_types(before, after) == after  # pyright: ignore[reportUnknownArgumentType, reportArgumentType]
    return maybe(upcast if is_wider else downcast, inner)


def _marks(case: Arguments, names: Sequence[str]) -> dict[float, str]:
    floats = (place for place, value in enumerate(case) if isinstance(value, float))
    return {FIRST_MARK + STEP * place: names[place] for place in floats}


def _names_in(term: Term) -> set[str]:
    return {
        name
        for inner in walk(term)
        if (name := getattr(inner, "name", "")) and not isinstance(inner, Operation)
    }


def _parameters(search: Callable[..., Any], cases: Sequence[Arguments], subject: str) -> list[str]:
    """Return the names of the arguments of `search`; every example must give as many."""
    names = list(inspect.signature(search).parameters)
    for place, case in enumerate(cases):
        if len(case) != len(names):
            raise FxoptError(
                f"{subject}: example {place} gives {len(case)} arguments, expected {len(names)} ({', '.join(names)})\n"
                "give a value for each argument, defaults too"
            )
    return names


def _compare(search: Callable[..., Any], replacement: Callable[..., Any], case: Arguments, name: str) -> None:
    """Raise unless `replacement` returns what `search` does, in number, shape and dtype."""
    results: list[tuple[Any, ...]] = []
    for function in (search, replacement):
        try:
            with torch.no_grad():
                found = function(*case)
        except Exception as error:
            text = next(iter(str(error).splitlines()), "")
            raise FxoptError(
                f"{name}: {_place(function)} raised {type(error).__name__} on an example: {text}\n"
                "both functions take the same arguments; give examples that they accept"
            ) from error
        results.append(found if isinstance(found, tuple) else (found,))
    expected, got = (
        [
            f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}"
            if isinstance(v, torch.Tensor)
            else repr(v)
            for v in r
        ]
        for r in results
    )
    if expected != got:
        raise FxoptError(
            f"{name}: {_place(replacement)} returns other values than {_place(search)}, "
            f"expected {', '.join(expected)}, got {', '.join(got)}\n"
            "return tensors of the same number, shapes and dtypes"
        )


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return `function`, under `name` where it has none that a graph can call it by."""
    if getattr(function, "__name__", "").isidentifier():
        return function

    def run(*args: Any) -> Any:
        return function(*args)

    run.__name__ = run.__qualname__ = name
    return run


def _place(function: Callable[..., Any]) -> str:
    """Return "name (file:line)" of a function, its name alone where it has no source."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    name = getattr(function, "__name__", type(function).__name__)
    return f"{name} ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else name
