"""The matcher on graphs built by hand: operand orders, alternatives, names, dims, lists, outputs, reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from fxopt.errors import FxoptError
from fxopt.graph import vocabulary
from fxopt.rewriting.matcher import find_matches, unify_shape
from fxopt.rewriting.pattern import Pattern, call
from fxopt.rewriting.roots import find_rare_ops
from fxopt.rewriting.terms import (
    also,
    attribute,
    cast,
    cat,
    choice,
    chunk,
    either,
    exp,
    linear,
    many,
    maybe,
    mean,
    number,
    rsqrt,
    sigmoid,
    tanh,
    tensor,
)
from fxopt.rewriting.trace import Trace


def match_all(term: Any, root: fx.Node) -> tuple[list[dict[str, Any]], Trace]:
    """Return the names of every match of `term` at `root`."""
    trace = Trace("test")
    pattern = Pattern("test", lambda: term, replace=lambda m: call(torch.exp, m["x"]))
    return [dict(bindings.values) for bindings, _ in find_matches(pattern, root, trace)], trace


def test_addition_and_multiplication_match_in_both_orders(builder: Any) -> None:
    a, b = builder.input("a", 3), builder.input("b", 3)
    product = builder.call(torch.mul, builder.call(torch.tanh, a), b)
    term = tensor("y") * tanh(tensor("x"))
    assert match_all(term, product)[0] == [{"x": a, "y": b}]
    assert match_all(tensor("y") - tanh(tensor("x")), product)[0] == []


def test_a_name_is_one_value(builder: Any) -> None:
    a, b = builder.input("a", 3), builder.input("b", 3)
    x = tensor("x")
    same = builder.call(torch.mul, a, builder.call(torch.sigmoid, a))
    other = builder.call(torch.mul, b, builder.call(torch.sigmoid, a))
    assert match_all(x * sigmoid(x), same)[0] == [{"x": a}]
    found, trace = match_all(x * sigmoid(x), other)
    assert found == []
    assert trace.nearest is not None
    assert trace.nearest.reason == "x: expected placeholder b as elsewhere, got placeholder a"


def test_one_term_matches_two_nodes_that_compute_the_same(builder: Any) -> None:
    a = builder.input("a", 3, 4)
    first, second = (builder.call(torch.mean, a, dim=(-1,), keepdim=True) for _ in range(2))
    total = builder.call(torch.add, builder.call(torch.exp, first), second)
    m = mean(tensor("x"))
    assert match_all(exp(m) + m, total)[0] == [{"x": a}]


def test_alternatives_are_revisited_when_a_later_part_fails(builder: Any) -> None:
    """The first alternative matches where it stands; only what follows shows that it was the wrong one."""
    a = builder.input("a", 3)
    inner = builder.call(torch.exp, a)
    outer = builder.call(torch.add, builder.call(torch.exp, inner), builder.call(torch.tanh, inner))
    x = tensor("x")
    # Greedy, `either` would take exp(exp(x)) with x = a, and tanh(x) would then have to be tanh(a).
    term = either(exp(exp(x)), exp(x)) + tanh(x)
    assert match_all(term, outer)[0] == [{"x": inner}]
    named = choice("depth", two=exp(exp(x)), one=exp(x)) + tanh(x)
    assert match_all(named, outer)[0] == [{"x": inner, "depth": "one"}]


def test_every_combination_of_alternatives_is_reachable(builder: Any) -> None:
    a = builder.input("a", 3)
    node = a
    for _ in range(3):
        node = builder.call(torch.exp, node)
    term = maybe(exp, maybe(exp, exp(tensor("x")), "second"), "third")
    found, _ = match_all(term, node)
    assert [(m["third"], m["second"]) for m in found] == [
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    ]


def test_a_choice_used_twice_is_made_once(builder: Any) -> None:
    a = builder.input("a", 3)
    up = builder.call(vocabulary.cast, a, dtype=torch.float64)
    mixed = builder.call(torch.add, builder.call(torch.exp, up), builder.call(torch.tanh, a))
    x = tensor("x")

    def twice(name: str) -> Any:
        return exp(maybe(cast, x, name)) + tanh(maybe(cast, x, name))

    assert match_all(twice("wide"), mixed)[0] == []
    assert len(match_all(twice(""), mixed)[0]) == 1


def test_numbers_and_literals(builder: Any) -> None:
    a = builder.input("a", 3)
    node = builder.call(torch.add, a, 1e-6)
    assert match_all(tensor("x") + number("eps"), node)[0] == [{"x": a, "eps": 1e-6}]
    assert match_all(tensor("x") + 1e-6, node)[0] == [{"x": a}]
    assert match_all(tensor("x") + 1e-5, node)[0] == []
    assert match_all(tensor("x") + tensor("y"), node)[0] == []
    assert match_all(1 + tensor("x"), builder.call(torch.add, a, True))[0] == []


def test_attributes_bind_or_must_be_equal(builder: Any) -> None:
    a = builder.input("a", 3, 4)
    node = builder.call(torch.mean, a, dim=(-2,), keepdim=True)
    assert match_all(mean(tensor("x"), dim=attribute("dim")), node)[0] == [{"x": a, "dim": (-2,)}]
    found, trace = match_all(mean(tensor("x")), node)
    assert found == []
    assert trace.nearest is not None
    assert trace.nearest.reason == "dim of mean: expected (-1,), got (-2,)"
    other = builder.call(torch.mean, a, dim=(-1,), keepdim=False)
    assert match_all(mean(tensor("x")), other)[0] == []


def test_of_two_equal_arguments_the_one_that_differs_is_named(builder: Any) -> None:
    halves = builder.call(torch.chunk, builder.input("a", 3, 4, 4), chunks=2, dim=2)
    found, trace = match_all(chunk(tensor("x"), 2), halves)
    assert found == []
    assert trace.nearest is not None
    assert trace.nearest.reason == "dim of chunk: expected -1, got 2"


def test_dims_unify_over_the_whole_pattern(builder: Any) -> None:
    a, w, v = builder.input("a", 2, 5, 8), builder.input("w", 8), builder.input("v", 5, 1)
    term = tensor("x", "* H") * tensor("w", "H")
    assert match_all(term, builder.call(torch.mul, a, w))[0] == [{"x": a, "w": w}]
    found, trace = match_all(term, builder.call(torch.mul, a, v))
    assert found == []
    assert trace.nearest is not None
    assert trace.nearest.reason == "w: expected shape [H], got [5, 1]"
    assert unify_shape(("*", "T", "H"), (2, 5, 8), {"T": 5}) == {"T": 5, "H": 8}
    assert unify_shape(("T", "H"), (2, 5, 8), {}) == "expected shape [T, H], got [2, 5, 8]"


def test_symbolic_dims_unify_by_expression_and_add_no_guard() -> None:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    symbols = []
    for name, value in (("a", 4), ("b", 6)):
        symbol = env.create_symbol(value, ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC)
        symbols.append(env.create_symintnode(symbol, hint=value, source=ConstantSource(name)))
    a, b = symbols
    assert unify_shape(("N",), (a,), {"N": a * 1}) == {"N": a * 1}
    assert isinstance(unify_shape(("N",), (b,), {"N": a}), str)
    assert env.guards == []


def test_dtypes_constrain(builder: Any) -> None:
    a = builder.input("a", 3, dtype=torch.bfloat16)
    node = builder.call(torch.exp, a)
    assert match_all(exp(tensor("x", "*", torch.bfloat16, torch.float16)), node)[0] == [{"x": a}]
    found, trace = match_all(exp(tensor("x", "*", torch.float32)), node)
    assert found == []
    assert trace.nearest is not None
    assert trace.nearest.reason == "x: expected torch.float32, got torch.bfloat16"


def test_a_list_may_be_of_any_length(builder: Any) -> None:
    x = builder.input("x", 2, 4)
    weights = [builder.input(f"w{place}", 3, 4) for place in range(3)]
    rows = [builder.call(torch.nn.functional.linear, x, w, None) for w in weights]
    joined = builder.call(torch.cat, tuple(rows), dim=-1)
    term = cat(many("parts", linear(tensor("x"), tensor("w"))))
    (found,) = match_all(term, joined)[0]
    assert [part["w"] for part in found["parts"]] == weights
    # x is first bound inside the list, so it belongs to its items; bound before, it is shared.
    assert [part["x"] for part in found["parts"]] == [x, x, x]
    mixed = builder.call(torch.cat, (rows[0], x), dim=-1)
    assert match_all(term, mixed)[0] == []
    assert match_all(cat(many("parts", linear(tensor("x"), tensor("w"))), tensor("last")), mixed)[0] != []


def test_several_outputs_share_their_names(builder: Any) -> None:
    a, b = builder.input("a", 3), builder.input("b", 3)
    shared = builder.call(torch.exp, a)
    left, right = builder.call(torch.tanh, shared), builder.call(torch.sigmoid, shared)
    x = tensor("x")
    pattern = Pattern(
        "two", lambda: (tanh(exp(x)), sigmoid(exp(x))), replace=lambda m: call(torch.exp, m["x"])
    )
    trace = Trace("two")
    assert [outputs for _, outputs in find_matches(pattern, left, trace)] == [(left, right)]
    builder.call(torch.sigmoid, builder.call(torch.exp, a))
    alone = builder.call(torch.tanh, builder.call(torch.exp, b))
    assert list(find_matches(pattern, alone, trace)) == []


def test_a_further_output_may_be_missing(builder: Any) -> None:
    a, b, c, d, e = (builder.input(name, 3) for name in "abcde")
    left, right = builder.call(torch.mul, a, c), builder.call(torch.mul, b, c)
    alone = builder.call(torch.mul, d, e)
    x, y, shared = tensor("x"), tensor("y"), tensor("shared")
    pattern = Pattern(
        "two", lambda: (x * shared, also(y * shared)), replace=lambda m: call(torch.exp, m["x"])
    )
    trace = Trace("two")
    found = [outputs for _, outputs in find_matches(pattern, left, trace)]
    assert found.index((left, right)) < found.index((left,))
    assert {outputs for _, outputs in find_matches(pattern, alone, trace)} == {(alone, alone), (alone,)}


def test_the_reason_is_that_of_the_failure_that_came_furthest(builder: Any) -> None:
    a = builder.input("a", 3, 4)
    total = builder.call(torch.sum, builder.call(torch.pow, a, exponent=2), dim=(-1,), keepdim=True)
    node = builder.call(torch.mul, a, builder.call(torch.rsqrt, builder.call(torch.add, total, 1e-6)))
    x = tensor("x")
    term = either(x * rsqrt(mean(x**2) + number("eps")), x / x)
    found, trace = match_all(term, node)
    assert found == []
    assert trace.nearest is not None
    assert (trace.nearest.reason, trace.nearest.nodes, trace.nearest.progress) == (
        "expected mean, got sum",
        (total,),
        3,
    )
    assert not trace.nearest


def test_alternatives_that_fail_at_one_place_are_listed(builder: Any) -> None:
    a = builder.input("a", 3)
    node = builder.call(torch.mul, builder.call(torch.abs, a), 2.0)
    _, trace = match_all(
        either(exp(tensor("x")), either(tanh(tensor("x")), sigmoid(tensor("x")))) * 2.0, node
    )
    assert trace.nearest is not None
    assert trace.nearest.reason == "expected exp or tanh or sigmoid, got abs"


def test_the_rare_ops_are_the_rarest_of_which_every_match_has_one() -> None:
    x = tensor("x")
    term = either(x * rsqrt(mean(x**2)), x / mean(x**2))
    counts = {torch.mul: 9, torch.div: 9, torch.rsqrt: 2, torch.mean: 20, torch.pow: 30}
    assert find_rare_ops(term, counts) == {torch.rsqrt, torch.div}
    assert find_rare_ops(term, {**counts, torch.mean: 5}) == {torch.rsqrt, torch.mean}
    assert find_rare_ops(term, {**counts, torch.mean: 1}) == {torch.mean}
    assert find_rare_ops(maybe(exp, x), {}) is None


def raising() -> Any:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (lambda: 3, r"odd: .* returned 3, expected a term, got int"),
        (lambda: None, r"odd: .* returned None, expected a term, got NoneType"),
        (tuple, r"odd: .* returned no terms"),
        (lambda: (exp(tensor("x")), "y"), r"odd: .* returned 'y', expected a term, got str"),
        (raising, r"odd: raising \(test_matcher.py:\d+\): expected a term, got KeyError: 'x'\nuse"),
        (lambda: exp(many("parts", tensor("x"))), r"'exp\(x, ...\)', expected many\(...\) in a list"),
        (
            lambda: exp(maybe(tanh, many("x", tensor("x")))),
            r"expected many\(...\) in a list of arguments, as",
        ),
        (
            lambda: exp(cat(many("a", tensor("x")), many("b", tensor("y")))),
            r"returned 'cat\(\[x, ..., y, ...\], dim=-1\)', expected at most one many\(...\) in a list of arguments",
        ),
    ],
)
def test_a_search_that_cannot_be_matched_is_refused_when_it_is_made(search: Any, message: str) -> None:
    pattern = Pattern("odd", search, replace=lambda m: m["x"])
    with pytest.raises(FxoptError, match=message):
        _ = pattern.terms


def test_a_pattern_that_may_be_a_bare_tensor_is_refused() -> None:
    pattern = Pattern("loose", lambda: maybe(exp, tensor("x")), replace=lambda m: m["x"])
    with pytest.raises(
        FxoptError, match=r"loose: <lambda> \(test_matcher.py:\d+\) returned .* every alternative is"
    ):
        _ = pattern.terms
