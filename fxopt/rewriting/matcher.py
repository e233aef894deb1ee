"""Match a pattern's terms against a graph: a backtracking search over immutable bindings.

`find_matches` yields every way in which a pattern matches with a given node as its first output, the
preferred alternatives first. Nothing here changes a graph. A `Trace` counts the steps and remembers
the failure that came furthest, so that a "no" always has a reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from fxopt.graph.arguments import same_size
from fxopt.graph.view import dtype_of, shape_of
from fxopt.graph.vocabulary import COMMUTATIVE
from fxopt.rewriting.pattern import Pattern
from fxopt.rewriting.prefilter import Pairs, could_match, is_equal, pair_arguments
from fxopt.rewriting.roots import climb
from fxopt.rewriting.trace import ELSEWHERE, Bindings, Trace, first_matching
from fxopt.rewriting.trees import (
    Also,
    Attribute,
    Either,
    Escaping,
    Many,
    Named,
    Number,
    Operation,
    Tensor,
    Term,
    depth_of,
    describe,
    items_of,
    name_of,
    walk,
)


def find_matches(
    pattern: Pattern, root: fx.Node, trace: Trace
) -> Iterator[tuple[Bindings, tuple[fx.Node, ...]]]:
    """Yield every match of `pattern` whose first output is `root`, with the nodes of all its outputs."""
    first, *others = pattern.terms
    for bindings in match_term(first, root, Bindings(), trace):
        yield from _match_other_outputs(others, bindings, (root,), trace)


def _match_other_outputs(
    terms: Sequence[Term], bindings: Bindings, outputs: tuple[fx.Node, ...], trace: Trace
) -> Iterator[tuple[Bindings, tuple[fx.Node, ...]]]:
    if not terms:
        yield bindings, outputs
        return
    term, *others = terms
    found = False
    # Why an output that may be missing is missing is no reason for a mismatch.
    inner = dataclasses.replace(trace, steps=0) if isinstance(term, Also) else trace
    for root in _find_roots_by_bindings(term, bindings):
        for joined in match_term(term, root, bindings, inner):
            found = True
            yield from _match_other_outputs(others, joined, (*outputs, root), trace)
    if inner is not trace:
        trace.steps += inner.steps
    if isinstance(term, Also):
        # Without it too: with it the match may not be legal, or not hold.
        yield from _match_other_outputs(others, bindings, outputs, trace)
    elif not found:
        trace.fail(f"no node matches the further output {describe(term)}", outputs, bindings)


def _find_roots_by_bindings(term: Term, bindings: Bindings) -> list[fx.Node]:
    """Return where a further output may stand: above the nodes that its leaves are bound to already."""
    leaves = [leaf.name for leaf in walk(term) if isinstance(leaf, Tensor)]
    bound = [node for name in leaves if isinstance(node := bindings.values.get(name), fx.Node)]
    targets = frozenset(inner.target for inner in walk(term) if isinstance(inner, Operation))
    if not bound:
        return []
    start = min(bound, key=lambda node: len(node.users))
    reached = climb(start, depth_of(term), lambda node: node.target in targets)
    return [node for node in reached if node.target in term.heads]


def match_term(term: Any, value: Any, bindings: Bindings, trace: Trace) -> Iterator[Bindings]:
    """Yield every extension of `bindings` under which `term` matches `value`, a node or a plain value."""
    trace.steps += 1
    match term:
        case Operation():
            yield from _match_operation(term, value, bindings, trace)
        case Either():
            yield from _match_either(term, value, bindings, trace)
        case Tensor():
            yield from _match_tensor(term, value, bindings, trace)
        case Escaping():
            for joined in match_term(term.term, value, bindings, trace):
                yield joined.allow(value, term) if value in joined.nodes else joined
        case Also():
            yield from match_term(term.term, value, bindings, trace)
        case Named():
            for joined in match_term(term.term, value, bindings, trace):
                yield from _unify(term.name, value, joined, trace)
        case Number():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield from _unify(term.name, value, bindings, trace)
            else:
                trace.fail(f"{term.name}: expected a number, got {_show(value)}", _nodes(value), bindings)
        case Attribute():
            yield from _unify(term.name, value, bindings, trace)
        case tuple() if any(isinstance(item, Term) for item in items_of(term)):
            yield from _match_items(items_of(term), value, bindings, trace)
        case Term():
            raise TypeError(f"{describe(term)}: {type(term).__name__} may stand only in a list of arguments")
        case _:
            if term is ... or is_equal(term, value):
                yield bindings
            else:
                trace.fail(_differs(term, value), _nodes(value), bindings)


def _differs(term: Any, value: Any) -> str:
    return f"expected {_show(term)}, got {_show(value)}"


def _match_operation(term: Operation, value: Any, bindings: Bindings, trace: Trace) -> Iterator[Bindings]:
    if trace.known is not None and not could_match(term, value, trace.known):
        return
    if not isinstance(value, fx.Node) or value.op != "call_function" or value.target is not term.target:
        trace.fail(f"expected {name_of(term.target)}, got {_show(value)}", _nodes(value), bindings)
        return
    if (id(term), value) in bindings.places:
        yield bindings
        return
    if term.condition is not None and not term.condition(value):
        trace.fail(f"expected {term.expected}, got {_show(value)}", (value,), bindings)
        return
    attributes, operands, wrong = pair_arguments(term, value)
    entered = bindings.enter(term, value)
    if wrong:
        wrong = f"{name_of(term.target)}: {wrong}"
        trace.fail(wrong, (value,), bindings)
        if not trace.forgives or bindings.forgiven is not None:
            return
        entered = entered.forgive(wrong, value)
    orders = [operands]
    if term.target in COMMUTATIVE and len(operands) == 2 and operands[0][2] is not operands[1][2]:
        (first, a, left), (second, b, right) = operands
        orders.append([(second, a, right), (first, b, left)])
    unequal = next((each for each in attributes if _is_plain(each[1]) and not is_equal(*each[1:])), None)
    if unequal is not None and not trace.forgives:
        trace.fail(_differs_in(value, *unequal), (value,), entered)
        return
    yield from first_matching(
        [_match_all([*attributes, *order], entered, trace, value) for order in orders], trace
    )


def _match_all(
    pairs: Pairs, bindings: Bindings, trace: Trace, of: fx.Node | None = None
) -> Iterator[Bindings]:
    """Yield every extension of `bindings` under which all `pairs`, arguments `of` a node if given, match."""
    if not pairs:
        yield bindings
        return
    (name, term, value), *others = pairs
    if of is not None and not trace.forgives and _is_value(term) and not is_equal(term, value):
        trace.fail(_differs_in(of, name, term, value), (of,), bindings)
        return
    for joined in match_term(term, value, bindings, trace):
        yield from _match_all(others, joined, trace, of)
    if of is None or not trace.forgives or bindings.forgiven is not None:
        return
    if _is_plain(term) and _is_plain(value) and not is_equal(term, value):
        yield from _match_all(others, bindings.forgive(_differs_in(of, name, term, value), of), trace, of)


def _differs_in(node: fx.Node, name: str, term: Any, value: Any) -> str:
    """Return how the argument `name` of `node` differs, "" being one without a name."""
    of = f"{name} of " if name else ""
    return f"{of}{name_of(node.target)}: {_differs(term, value)}"


def _is_value(term: Any) -> bool:
    """Return whether `term`, of a pattern, is one value that an argument must have, and no list."""
    return term is not ... and not isinstance(term, Term | tuple | list)


def _is_plain(item: Any) -> bool:
    """Return whether `item`, of a pattern or a graph, is a value and holds no term and no node."""
    return item is not ... and not any(isinstance(part, Term | fx.Node) for part in items_of(item))


def _match_either(term: Either, value: Any, bindings: Bindings, trace: Trace) -> Iterator[Bindings]:
    alternatives: list[Iterator[Bindings]] = []
    looks_ahead = trace.known is not None and isinstance(value, fx.Node)
    for tag, option in term.options_of(value) if looks_ahead else term.options:
        if trace.known is not None and not could_match(option, value, trace.known):
            continue
        if not term.name:
            alternatives.append(match_term(option, value, bindings, trace))
        elif term.name not in bindings.values:
            alternatives.append(match_term(option, value, bindings.bind(term.name, tag), trace))
        elif bindings.values[term.name] == tag:
            alternatives.append(match_term(option, value, bindings, trace))
    yield from first_matching(alternatives, trace)


def _match_tensor(term: Tensor, value: Any, bindings: Bindings, trace: Trace) -> Iterator[Bindings]:
    shape = shape_of(value) if isinstance(value, fx.Node) else None
    if shape is None:
        trace.fail(f"{term.name}: expected a tensor, got {_show(value)}", _nodes(value), bindings)
        return
    if term.dtypes is not None and dtype_of(value) not in term.dtypes:
        expected = " or ".join(sorted(map(str, term.dtypes)))
        trace.fail(f"{term.name}: expected {expected}, got {dtype_of(value)}", (value,), bindings)
        return
    for joined in _unify(term.name, value, bindings, trace):
        dims = joined.dims
        if term.shape is not None:
            dims = unify_shape(term.shape, shape, joined.dims)
        if isinstance(dims, str):
            trace.fail(f"{term.name}: {dims}", (value,), bindings)
            return
        yield joined if dims is joined.dims else dataclasses.replace(joined, dims=dims)


def unify_shape(
    expected: tuple[str, ...], shape: Sequence[Any], known: Mapping[str, Any]
) -> Mapping[str, Any] | str:
    """Return `known` with the named dims of `expected` bound to `shape`, or what does not fit.

    `*` stands for any number of leading dims and binds nothing; sizes may be symbolic.

    >>> unify_shape(("*", "H"), (2, 3, 8), {})
    {'H': 8}
    >>> unify_shape(("H",), (4,), {"H": 8})
    'expected size H = 8, got 4'
    """
    names = [name for name in expected if name != "*"]
    if len(shape) < len(names) or (len(shape) > len(names) and "*" not in expected):
        return f"expected shape [{', '.join(expected)}], got {_show_shape(shape)}"
    dims = dict(known)
    for name, size in zip(names, shape[len(shape) - len(names) :], strict=True):
        if not same_size(dims.setdefault(name, size), size):
            return f"expected size {name} = {dims[name]}, got {size}"
    return dims


def _unify(name: str, value: Any, bindings: Bindings, trace: Trace) -> Iterator[Bindings]:
    if name not in bindings.values:
        yield bindings.bind(name, value)
    elif is_equal(bindings.values[name], value):
        yield bindings
    else:
        bound = bindings.values[name]
        expected, got = _show(bound), _show(value)
        if expected == got and isinstance(bound, fx.Node) and isinstance(value, fx.Node):
            expected, got = f"{bound.name} ({expected})", f"{value.name} ({got})"
        reason = f"{name}: expected {expected} {ELSEWHERE}, got {got}"
        trace.fail(reason, _nodes(value), bindings)


def _match_items(terms: tuple[Any, ...], value: Any, bindings: Bindings, trace: Trace) -> Iterator[Bindings]:
    if not isinstance(value, list | tuple):
        trace.fail(f"expected a list, got {_show(value)}", _nodes(value), bindings)
        return
    items = list(items_of(value))
    variadic = [index for index, term in enumerate(terms) if isinstance(term, Many)]
    if not variadic:
        if len(items) != len(terms):
            trace.fail(f"expected {len(terms)} items, got {len(items)}", _nodes(items), bindings)
            return
        pairs = [("", term, item) for term, item in zip(terms, items, strict=True)]
        yield from _match_all(pairs, bindings, trace)
        return
    (index,) = variadic
    many: Many = terms[index]
    after = len(terms) - index - 1
    if len(items) < index + many.at_least + after:
        trace.fail(f"expected at least {index + many.at_least + after} items", _nodes(items), bindings)
        return
    middle = items[index : len(items) - after]
    fixed = [
        *zip(terms[:index], items, strict=False),
        *zip(terms[index + 1 :], items[len(items) - after :], strict=True),
    ]
    for joined in _match_all([("", term, item) for term, item in fixed], bindings, trace):
        yield from _match_many(many, middle, joined, (), trace)


def _match_many(
    many: Many, items: list[Any], bindings: Bindings, done: tuple[Mapping[str, Any], ...], trace: Trace
) -> Iterator[Bindings]:
    """Match each item by `many.term`; names first bound inside it belong to the item alone."""
    if not items:
        yield from _unify(many.name, done, bindings, trace)
        return
    first, *others = items
    for joined in match_term(many.term, first, bindings, trace):
        own = {name: value for name, value in joined.values.items() if name not in bindings.values}
        shared = dataclasses.replace(bindings, nodes=joined.nodes, forgiven=joined.forgiven)
        yield from _match_many(many, others, shared, (*done, own), trace)


def _nodes(value: Any) -> tuple[fx.Node, ...]:
    return tuple(item for item in items_of(value) if isinstance(item, fx.Node))


def _show(value: Any) -> str:
    if not isinstance(value, fx.Node):
        return str(value)
    if value.op == "call_function":
        shown = ", ".join(str(arg) for arg in value.args[1:] if isinstance(arg, int | float))
        return f"{name_of(value.target)}({shown})" if shown else name_of(value.target)
    if value.op == "call_method":
        return f".{value.target}"
    return f"{value.op} {value.name}"


def _show_shape(shape: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, shape))}]"
