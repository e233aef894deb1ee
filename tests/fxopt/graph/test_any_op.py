"""Method and function, positions and names: one form for every op of torch, and never for two ops."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxopt.graph.any_op import _run_same  # pyright: ignore[reportPrivateUsage]
from fxopt.graph.canonicalize import canonicalize
from fxopt.graph.snapshot import snapshot

X = torch.rand(3, 4, 4)
ARGUMENTS: tuple[tuple[Any, ...], ...] = (
    (),
    (0,),
    (X,),
    (1, 0),
    (0.25, 0.5),
    (2, -1),
    (X, 0.5),
    (X, X),
    (X > 0.5, 0.0),
    (-1, torch.zeros(3, 4, 4).long()),
    (0, torch.tensor([0, 1])),
    (0, torch.tensor([0, 1]), torch.ones(2, 4, 4)),
    (-1, torch.zeros(3, 4, 4).long(), X),
)
"""What an op is tried with, the first that it takes."""
RANDOM = frozenset({"bernoulli"})
SHAPED_BY_VALUES = frozenset({"argwhere", "nonzero", "unique", "unique_consecutive"})
"""Ops whose results have shapes that only values tell: on tensors without storage they do not run."""


def one_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> fx.GraphModule:
    """Return a graph of one call, of a method where `target` is a name; tensors are its inputs."""
    graph, inputs = fx.Graph(), dict[int, fx.Node]()

    def given(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        if id(item) not in inputs:
            inputs[id(item)] = graph.placeholder(f"x{len(inputs)}")
            inputs[id(item)].meta["example_value"] = item
        return inputs[id(item)]

    args, kwargs = tuple(map(given, args)), {name: given(item) for name, item in kwargs.items()}
    call = graph.call_method if isinstance(target, str) else graph.call_function
    node = call(target, args, kwargs)
    node.meta["example_value"] = result
    graph.output((node,))
    return fx.GraphModule({}, graph)


def canonical_text(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> str:
    gm = one_call(target, args, kwargs, result)
    canonicalize(gm)
    return snapshot(gm, numbered=True)


def names_of_both() -> list[str]:
    return [
        name
        for name in sorted(set(dir(torch.Tensor)) & set(dir(torch)))
        if not name.startswith("_") and not name.endswith("_") and callable(getattr(torch, name))
    ]


def first_result(name: str) -> tuple[tuple[Any, ...], Any] | None:
    """Return the first arguments with which method and function give equal tensors, and these."""
    for args in ARGUMENTS:
        try:
            result = getattr(X, name)(*args)
            same = getattr(torch, name)(X, *args)
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
        if (
            isinstance(result, Tensor)
            and result is not X
            and torch.equal(result.nan_to_num(), same.nan_to_num())
        ):
            return args, result
    return None


@pytest.mark.filterwarnings("ignore")  # what torch calls deprecated is tried too
def test_method_and_function_are_one_op_for_all_that_torch_has_as_both() -> None:
    apart: list[str] = []
    number = 0
    for name in names_of_both():
        found = first_result(name)
        if found is None or name in RANDOM | SHAPED_BY_VALUES:
            continue
        args, result = found
        number += 1
        method = canonical_text(name, (X, *args), {}, result)
        if method != canonical_text(getattr(torch, name), (X, *args), {}, result) or " = ." in method:
            apart.append(name)
    assert not apart
    assert number > 180


FORMS = {
    "amax(%0, dim=(-1,), keepdim=True)": [
        ("amax", (-1, True), {}),
        ("amax", (2,), {"keepdim": True}),
        (torch.amax, ((2,),), {"keepdim": True}),
        (torch.amax, (), {"dim": -1, "keepdims": True}),
        (torch.amax, (), {"axis": [2], "keepdim": True}),
    ],
    "roll(%0, (1,), dims=(-1,))": [
        ("roll", (1, 2), {}),
        (torch.roll, ([1],), {"dims": (-1,)}),
        (torch.roll, (), {"shifts": 1, "dims": 2}),
    ],
    "flip(%0, (-3, -1))": [
        ("flip", (0, 2), {}),
        (torch.flip, ((0, -1),), {}),
        ("flip", (), {"dims": [0, 2]}),
    ],
    "log_softmax(%0, -1, dtype=None)": [
        ("log_softmax", (2,), {}),
        (F.log_softmax, (), {"dim": -1}),
        (torch.special.log_softmax, (-1,), {}),
    ],
    "expm1(%0)": [("expm1", (), {}), (torch.expm1, (), {}), (torch.special.expm1, (), {})],
    "selu(%0)": [(F.selu, (), {}), (torch.selu, (), {}), (F.selu, (), {"inplace": False})],
    "std(%0, dim=(-1,), correction=0, keepdim=True)": [
        ("std", (-1, False, True), {}),
        (torch.std, (), {"dim": 2, "correction": 0, "keepdim": True}),
    ],
    "gt(%0, 0)": [("gt", (0,), {}), (torch.greater, (0,), {}), (operator.gt, (0,), {})],
    "round(%0, decimals=2)": [("round", (), {"decimals": 2}), (torch.round, (), {"decimals": 2})],
}
CASES = [(text, call) for text, calls in FORMS.items() for call in calls]


@pytest.mark.parametrize(("text", "call"), CASES)
def test_positions_and_names_are_one_form(text, call) -> None:
    target, args, kwargs = call
    function = getattr(torch.Tensor, target) if isinstance(target, str) else target
    lines = canonical_text(target, (X, *args), kwargs, function(X, *args, **kwargs)).splitlines()
    assert lines[1].split(" = ")[1] == text


def test_two_ops_of_one_name_stay_two() -> None:
    square = X[0]
    norms = {
        canonical_text(function, (square,), {"dim": (0, 1)}, function(square, dim=(0, 1)))
        for function in (torch.norm, torch.linalg.norm)
    }
    ones = {
        canonical_text(function, (square,), {"ord": 1}, function(square, ord=1))
        for function in (torch.linalg.norm, torch.linalg.vector_norm)
    }
    crossed = torch.rand(3, 3, 3)
    crosses = {
        canonical_text(function, (crossed, crossed * 2), {"dim": dim}, crossed)
        for function, dim in ((torch.cross, 0), (torch.linalg.cross, -1))
    }
    assert len(norms) == len(ones) == len(crosses) == 2


def test_what_draws_writes_or_hangs_on_values_stays_as_it_is() -> None:
    for name, args in (("bernoulli", (0.5,)), ("nonzero", ()), ("sinh_", ()), ("sinh", ())):
        kwargs = {"out": torch.empty(3, 4, 4)} if name == "sinh" else {}
        target: Any = torch.sinh if kwargs else name
        gm = one_call(target, (X, *args), kwargs, X)
        stock = snapshot(gm)
        canonicalize(gm)
        assert snapshot(gm) == stock


def test_asking_whether_two_calls_are_one_op_is_done_once() -> None:
    canonical_text("tan", (X,), {}, X)
    before = _run_same.cache_info()
    canonical_text("tan", (X,), {}, X)
    after = _run_same.cache_info()
    assert after.hits > before.hits
    assert after.misses == before.misses
