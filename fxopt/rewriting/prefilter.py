"""Whether a term could match a node at all, names left aside: asked before a search, answered once a pair.

Without it a search tries every combination of alternatives; with it, only those that the ops allow.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.graph.signatures import default_of
from fxopt.graph.view import is_tensor
from fxopt.graph.vocabulary import BY_TARGET, COMMUTATIVE
from fxopt.rewriting.trees import (
    Also,
    Either,
    Escaping,
    Many,
    Named,
    Number,
    Operation,
    Target,
    Tensor,
    Term,
    items_of,
)

Known = dict[tuple[int, fx.Node], bool]


def could_match(term: Any, value: Any, known: Known) -> bool:
    """Return whether `term` matches `value` for some binding of its names; `known` remembers the answers.

    After a rewrite an answer may be out of date: a "yes" costs a search, a "no" is asked anew next sweep.
    """
    match term:
        case Operation() | Either():
            if not isinstance(value, fx.Node):
                return isinstance(term, Either) and any(could_match(o, value, known) for _, o in term.options)
            if term.heads and value.target not in term.heads:
                return False
            key = (id(term), value)
            if key not in known:
                if isinstance(term, Operation):
                    known[key] = _could_call(term, value, known)
                else:
                    known[key] = any(could_match(o, value, known) for _, o in term.options_of(value))
            return known[key]
        case Escaping() | Named() | Also():
            return could_match(term.term, value, known)
        case Tensor():
            return is_tensor(value)
        case Number():
            return isinstance(value, int | float) and not isinstance(value, bool)
        case tuple():
            return _could_list(items_of(term), value, known)
        case Term():
            return True
        case _:
            return term is ... or is_equal(term, value)


def _could_call(term: Operation, node: fx.Node, known: Known) -> bool:
    if node.op != "call_function" or not _could_read(term, node):
        return False
    if term.condition is not None and not term.condition(node):
        return False
    attributes, operands, wrong = pair_arguments(term, node)
    if wrong:
        return False
    if not all(could_match(expected, value, known) for _, expected, value in attributes):
        return False
    if all(could_match(operand, value, known) for _, operand, value in operands):
        return True
    if term.target not in COMMUTATIVE or len(operands) != 2:
        return False
    (_, a, left), (_, b, right) = operands
    return could_match(a, right, known) and could_match(b, left, known)


def _could_read(term: Operation, node: fx.Node) -> bool:
    """Return whether what `node` reads calls ops that the operands of `term` may: the cheapest look, taken first."""
    heads = term.heads_of_args
    if _could_head(heads, node.args):
        return True
    return term.target in COMMUTATIVE and len(heads) == 2 and _could_head(heads[::-1], node.args)


def _could_head(heads: tuple[frozenset[Target], ...], values: tuple[Any, ...]) -> bool:
    for expected, value in zip(heads, values, strict=False):
        if expected and isinstance(value, fx.Node) and value.target not in expected:
            return False
    return True


def _could_list(terms: tuple[Any, ...], value: Any, known: Known) -> bool:
    if not any(isinstance(term, Term) for term in terms):
        return is_equal(terms, value)
    if any(isinstance(term, Many) for term in terms):
        return True
    items = items_of(value)
    return len(items) == len(terms) and all(
        could_match(t, v, known) for t, v in zip(terms, items, strict=True)
    )


Pairs = list[tuple[str, Any, Any]]
"""Names of arguments, "" for one without, with what a term expects there and what a node has."""


def pair_arguments(term: Operation, node: fx.Node) -> tuple[Pairs, Pairs, str]:
    """Return what stands against what, attributes and operands apart, and what is wrong with the arguments, "" if
    nothing is."""
    operands: Pairs = []
    form = BY_TARGET.get(node.target)  # pyright: ignore[reportArgumentType]
    names = dict(enumerate(form.operands if form is not None else ()))
    wrong: list[str] = []
    for position, operand in enumerate(term.args):
        if position >= len(node.args) and operand is not None:
            wrong.append(f"expected {len(term.args)} operands, got {len(node.args)}")
        given = node.args[position] if position < len(node.args) else None
        operands.append((names.get(position, ""), operand, given))
    attributes: Pairs = []
    known: set[str] = set()
    for position, (name, expected) in enumerate(term.attributes, len(term.args)):
        known.add(name)
        if name in node.kwargs:
            attributes.append((name, expected, node.kwargs[name]))
        elif position < len(node.args):
            attributes.append((name, expected, node.args[position]))
        elif expected is not ...:
            wanted = name if isinstance(expected, Term) else f"{name}={expected}"
            wrong.append(f"expected {wanted}, got no {name}")
    if len(node.args) > len(term.args) + len(term.attributes):
        wrong.append(
            f"expected at most {len(term.args) + len(term.attributes)} arguments, got {len(node.args)}"
        )
    for name in sorted(node.kwargs):
        if name not in known and not _is_default(node, name):
            wrong.append(f"expected no {name}, got {node.kwargs[name]}")
    return attributes, operands, next(iter(wrong), "")


def _is_default(node: fx.Node, name: str) -> bool:
    """Return whether an op that has no form of its own is given for `name` what it takes unasked."""
    target: Any = node.target
    return target not in BY_TARGET and any(is_equal(d, node.kwargs[name]) for d in default_of(target, name))


def is_equal(expected: Any, value: Any) -> bool:
    """Return whether a value is the expected one: nodes by identity, floats up to a millionth."""
    if isinstance(expected, fx.Node) or isinstance(value, fx.Node):
        return expected is value
    if isinstance(expected, bool) or isinstance(value, bool):
        return expected is value
    if isinstance(expected, float) and isinstance(value, int | float):
        return abs(expected - value) <= 1e-6 * abs(expected)
    if isinstance(expected, list | tuple):
        items, others = items_of(expected), items_of(value)
        return len(items) == len(others) and all(map(is_equal, items, others))
    return expected == value
