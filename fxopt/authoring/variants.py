"""Other programs made from a captured graph: the same in other spellings, and broken ones."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fxopt.graph.edit import copy_of
from fxopt.graph.names import ALIASES, OPERATORS, op_name
from fxopt.graph.view import is_tensor, value_of

OPERATOR_OF = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}
IN_PLACE = {name for name in OPERATORS if name.startswith("i")}
COMMUTATIVE = ("add", "mul")
EVERYTHING: Any = (...,)
IDENTITIES: tuple[tuple[str, Callable[[fx.Graph, fx.Node], fx.Node]], ...] = (
    ("times one", lambda graph, node: graph.call_function(operator.mul, (node, 1))),
    ("minus zero", lambda graph, node: graph.call_function(operator.sub, (node, 0))),
    ("contiguous", lambda graph, node: graph.call_method("contiguous", (node,))),
    ("same dtype", lambda graph, node: graph.call_method("to", (node, value_of(node).dtype))),
    ("as it is", lambda graph, node: graph.call_function(operator.getitem, (node, EVERYTHING))),
)
"""What the canonicalizer takes away, because it returns its input or an exact copy."""


def spellings(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """Yield copies of the stock graph `gm`, one node of each spelled otherwise, by the canonicalizer's own laws.

    Some are no programs at all (a method that does not exist with these arguments): run them before you use them.
    """
    yield from _changed_copies(gm, _spellings_of)


def _changed_copies(
    gm: fx.GraphModule, changes_of: Callable[[fx.Node], Iterator[tuple[str, Callable[[fx.Node], None]]]]
) -> Iterator[tuple[str, fx.GraphModule]]:
    """Yield a copy of `gm` for each change of each of its nodes that computes a tensor."""
    for place, node in enumerate(gm.graph.nodes):
        if node.op not in ("call_function", "call_method") or not is_tensor(node):
            continue
        for what, change in changes_of(node):
            copy = copy_of(gm)
            change(list(copy.graph.nodes)[place])
            copy.recompile()
            yield f"{node.name}: {what}", copy


def _spellings_of(node: fx.Node) -> Iterator[tuple[str, Callable[[fx.Node], None]]]:
    name = op_name(node)
    if not name or name in IN_PLACE or name.endswith("_"):
        return
    names = [name, *(alias for alias, meant in ALIASES.items() if meant == name)]
    for other in names:
        if hasattr(torch.Tensor, other) and (node.op != "call_method" or other != name):
            yield f".{other}()", _as_method(other)
        if callable(getattr(torch, other, None)):
            yield f"torch.{other}()", _as_function(getattr(torch, other))
    if name in OPERATOR_OF and not node.kwargs:
        yield "operator", _as_function(OPERATOR_OF[name])
    if name in COMMUTATIVE and len(node.args) == 2 and not node.kwargs:
        yield "operands swapped", _swap
    if name == "pow" and node.args[1:] == (2,):
        yield "square", _call_alone(torch.square)
    for law, insert in IDENTITIES:
        yield law, _followed_by(insert)


def _as_method(name: str) -> Callable[[fx.Node], None]:
    def change(node: fx.Node) -> None:
        if is_tensor(node.args[0] if node.args else None):
            node.op, node.target = "call_method", name

    return change


def _as_function(target: Callable[..., Any]) -> Callable[[fx.Node], None]:
    def change(node: fx.Node) -> None:
        node.op, node.target = "call_function", target

    return change


def _call_alone(target: Callable[..., Any]) -> Callable[[fx.Node], None]:
    def change(node: fx.Node) -> None:
        node.op, node.target, node.args = "call_function", target, node.args[:1]

    return change


def _swap(node: fx.Node) -> None:
    a, b = node.args
    if is_tensor(a) and not is_tensor(b):  # a number in front takes an operator
        node.op, node.target = "call_function", OPERATOR_OF[op_name(node)]
    node.args = (b, a)


def _followed_by(insert: Callable[[fx.Graph, fx.Node], fx.Node]) -> Callable[[fx.Node], None]:
    def change(node: fx.Node) -> None:
        with node.graph.inserting_after(node):
            new = insert(node.graph, node)
        new.meta = {**node.meta}
        node.replace_all_uses_with(new, lambda user: user is not new)

    return change


def mutations(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """Yield copies of the stock graph `gm` that compute something else: a node dropped, operands swapped, a number
    changed."""
    yield from _changed_copies(gm, _mutations_of)


def _mutations_of(node: fx.Node) -> Iterator[tuple[str, Callable[[fx.Node], None]]]:
    same = [source for source in node.all_input_nodes if is_tensor(source) and _alike(source, node)]
    if same and node.users:
        yield "dropped", lambda copy: _drop(copy)
    if len(node.args) == 2 and op_name(node) in ("sub", "div", "matmul"):
        yield "operands swapped", lambda copy: setattr(copy, "args", copy.args[::-1])
    for index, value in enumerate(node.args):
        if isinstance(value, float | int) and not isinstance(value, bool) and index > 0:
            other = value * 1.5 + 0.25 if isinstance(value, float) else value + 1
            yield f"{value} is {other}", _with_argument(index, other)
        elif isinstance(value, float | int) and not isinstance(value, bool):
            yield f"{value} is {value * 2 + 1}", _with_argument(index, value * 2 + 1)


def _with_argument(index: int, value: Any) -> Callable[[fx.Node], None]:
    def change(node: fx.Node) -> None:
        node.update_arg(index, value)

    return change


def _drop(node: fx.Node) -> None:
    source = next(source for source in node.all_input_nodes if is_tensor(source) and _alike(source, node))
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def _alike(a: fx.Node, b: fx.Node) -> bool:
    return value_of(a).shape == value_of(b).shape and value_of(a).dtype == value_of(b).dtype
