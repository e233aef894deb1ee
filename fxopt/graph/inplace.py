"""In-place ops made pure, where the value they overwrite is a fresh one that nothing reads afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.graph.aliases import Aliases
from fxopt.graph.arguments import bind, is_number
from fxopt.graph.names import op_name
from fxopt.graph.view import is_tensor

BINARY = {
    "iadd": torch.add,
    "add_": torch.add,
    "isub": torch.sub,
    "sub_": torch.sub,
    "imul": torch.mul,
    "mul_": torch.mul,
    "idiv": torch.div,
    "div_": torch.div,
}
ACTIVATIONS = frozenset({"silu", "relu"})


def make_pure(graph: fx.Graph) -> int:
    """Turn in-place arithmetic into its pure form wherever nobody can tell, and return how often.

    The pure form has the same dtype, which is checked by torch's own promotion; autograd sees the same
    function of the same values.
    """
    aliases = Aliases(graph)
    count = 0
    for node in graph.nodes:
        target = _pure_target(node)
        earlier = None if target is None else _find_overwritten(node, aliases)
        if earlier is None:
            continue
        if node.op == "call_method" or node.target is not target:
            node.op, node.target = "call_function", target
        node.args, node.kwargs = node.args[:1] if _is_activation(node) else node.args[:2], {}
        # What is computed from `node` shares its memory still; what came before it no longer does.
        aliases.split(earlier)
        count += 1
    return count


def _pure_target(node: fx.Node) -> Any:
    """Return the pure op that computes what an in-place `node` does, in the same dtype; None if unknown."""
    name = op_name(node)
    if _is_activation(node):
        bound = bind(node, "x", inplace=False)
        is_inplace = bound is not None and bound["inplace"] is True and is_tensor(bound["x"])
        return node.target if is_inplace and len(node.args) >= 1 else None
    if name not in BINARY or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    if not (isinstance(a, fx.Node) and is_tensor(a) and (is_tensor(b) or is_number(b))):
        return None
    value = a.meta["example_value"]
    other = b.meta["example_value"] if isinstance(b, fx.Node) else b
    if not isinstance(other, int | float | torch.Tensor):
        other = 1.0 if isinstance(other, torch.SymFloat) else 1
    return (
        BINARY[name] if torch.result_type(value, other) == value.dtype and _can_divide(name, value) else None
    )


def _is_activation(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) in ACTIVATIONS


def _can_divide(name: str, value: torch.Tensor) -> bool:
    return name not in ("idiv", "div_") or value.is_floating_point()


def _find_overwritten(node: fx.Node, aliases: Aliases) -> list[fx.Node] | None:
    """Return all that held the memory `node` writes to, if nothing reads it later but through `node`."""
    overwritten = node.args[0]
    assert isinstance(overwritten, fx.Node)
    keys = aliases.keys_of(overwritten)
    if len(keys) != 1 or not _is_fresh(overwritten, aliases):
        return None
    here = aliases.order[node]
    earlier = [holder for holder in aliases.holders[next(iter(keys))] if aliases.order[holder] < here]
    if not all(_is_plain(holder, overwritten) for holder in earlier):
        return None
    is_unread = all(aliases.order[user] <= here for holder in earlier for user in holder.users)
    return earlier if is_unread else None


def _is_plain(holder: fx.Node, like: fx.Node) -> bool:
    value = holder.meta["example_value"]
    is_call = holder.op in ("call_function", "call_method")
    return is_call and isinstance(value, torch.Tensor) and value.dtype == like.meta["example_value"].dtype


def _is_fresh(node: fx.Node, aliases: Aliases) -> bool:
    """Return whether `node` made its memory itself, as no view does."""
    if node.op not in ("call_function", "call_method"):
        return False
    keys = aliases.keys_of(node)
    return all(keys.isdisjoint(aliases.keys_of(source)) for source in node.all_input_nodes)
