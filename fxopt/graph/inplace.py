"""In-place ops made pure, where the value they overwrite is a fresh one that nothing else shares afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.graph.aliases import Aliases
from fxopt.graph.arguments import bind, is_number
from fxopt.graph.edit import NO_GRAD, may_need_grad
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
RETURNING_SEVERAL = frozenset({"sort", "topk"})
"""Ops whose results have memory of their own each."""
LIMITS = {"clamp_": torch.clamp, "masked_fill_": torch.masked_fill}


def make_pure(graph: fx.Graph) -> int:
    """Turn in-place arithmetic into its pure form wherever nobody can tell, and return how often.

    The pure form has the same dtype, which is checked by torch's own promotion; autograd sees the same
    function of the same values. Written to with gradients off, a value keeps the gradient that it had, which what a
    pure form returns there would not have.
    """
    aliases = Aliases(graph)
    count = 0
    for node in graph.nodes:
        target = _pure_target(node)
        if target is not None and NO_GRAD in node.meta and may_need_grad(node.args[0]):
            continue
        earlier = None if target is None else _find_overwritten(node, aliases)
        if earlier is None:
            continue
        overwritten: Any = node.args[0]
        if node.op == "call_method" or node.target is not target:
            node.op, node.target = "call_function", target
        if target is torch.index_put:
            node.args, node.kwargs = (overwritten, (node.args[1],), node.args[2]), {}
            aliases.adopt(node, overwritten)
        elif target in (torch.clamp, torch.masked_fill, torch.scatter):
            pass  # they take the very arguments of the method
        else:
            node.args, node.kwargs = node.args[:1] if _is_activation(node) else node.args[:2], {}
        here = aliases.order[node]
        later = [user for user in overwritten.users if aliases.order[user] > here]
        for user in later:
            user.replace_input_with(overwritten, node)
        # What is computed from `node` shares its memory still; what came before it no longer does.
        aliases.split(earlier)
        count += 1
    return count


def _pure_target(node: fx.Node) -> Any:
    """Return the pure op that computes what an in-place `node` does, in the same dtype; None if unknown."""
    name = op_name(node)
    if name == "setitem":
        return torch.index_put if _is_put(node) else None
    if name in LIMITS:
        return LIMITS[name] if is_tensor(node) and _keeps_dtype(node) else None
    if name == "scatter_":
        return torch.scatter if _scatters(node) else None
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


def _is_put(node: fx.Node) -> bool:
    """Return whether a `setitem` puts a tensor's items where another one says, none of them with a gradient."""
    values = [item.meta.get("example_value") if isinstance(item, fx.Node) else None for item in node.args]
    written, index, new = (value if isinstance(value, torch.Tensor) else None for value in values)
    if written is None or index is None or new is None:
        return False
    fits = new.dtype == written.dtype and new.device == written.device and index.dtype == torch.int64
    return fits and not (written.requires_grad or new.requires_grad)


def _scatters(node: fx.Node) -> bool:
    """Return whether a `scatter_` puts a number, or items of a tensor of its own dtype, where another tensor says."""
    if len(node.args) != 4 or node.kwargs or not isinstance(node.args[1], int):
        return False
    written, _, _, new = node.args
    if isinstance(new, int | float):
        return isinstance(written, fx.Node)
    return isinstance(written, fx.Node) and isinstance(new, fx.Node) and _dtype_of(written) == _dtype_of(new)


def _keeps_dtype(node: fx.Node) -> bool:
    """Return whether an op would give the dtype that it writes to without being in place: its limits are numbers."""
    first: Any = node.args[0]
    value = first.meta.get("example_value")
    numbers = [item for item in (*node.args[1:], *node.kwargs.values()) if item is not None]
    masks = [item for item in numbers if isinstance(item, fx.Node)]
    if not isinstance(value, torch.Tensor) or any(_dtype_of(mask) != torch.bool for mask in masks):
        return False
    plain = [item for item in numbers if isinstance(item, int | float)]
    is_complete = len(plain) + len(masks) == len(numbers)
    return is_complete and all(torch.result_type(value, item) == value.dtype for item in plain)


def _dtype_of(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("example_value")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _is_activation(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) in ACTIVATIONS


def _can_divide(name: str, value: torch.Tensor) -> bool:
    return name not in ("idiv", "div_") or value.is_floating_point()


def _find_overwritten(node: fx.Node, aliases: Aliases) -> list[fx.Node] | None:
    """Return all that held the memory `node` writes to, if what reads it later may read `node` instead."""
    overwritten = node.args[0]
    assert isinstance(overwritten, fx.Node)
    keys = aliases.keys_of(overwritten)
    if len(keys) != 1:
        return None
    here = aliases.order[node]
    earlier = [holder for holder in aliases.holders[next(iter(keys))] if aliases.order[holder] < here]
    earlier = [holder for holder in earlier if not _is_list(holder)]
    # It may be a view: then what it is a view of is not read again.
    if not earlier or not _is_fresh(min(earlier, key=aliases.order.__getitem__), aliases):
        return None
    if not all(_is_plain(holder, overwritten) for holder in earlier):
        return None
    others = [holder for holder in earlier if holder is not overwritten]
    is_unread = all(aliases.order[user] <= here for holder in others for user in holder.users)
    if not is_unread or (_is_view(overwritten, aliases) and not _is_read_once(node, earlier)):
        return None
    return earlier


def _is_view(node: fx.Node, aliases: Aliases) -> bool:
    sources = [source for source in node.all_input_nodes if not _is_list(source)]
    return any(not aliases.keys_of(node).isdisjoint(aliases.keys_of(source)) for source in sources)


def _is_read_once(node: fx.Node, earlier: list[fx.Node]) -> bool:
    """Return whether the view that `node` writes to, and what it is a view of, were read by nothing else before.

    Autograd sums what flows into a view that was written through in another order than what flows into a value.
    """
    order = {user: place for place, user in enumerate(node.graph.nodes)}
    holders = {*earlier, node}
    return all(
        user in holders or order[user] > order[node] for holder in earlier for user in holder.users
    ) and all(sum(user in holders for user in holder.users) == 1 for holder in earlier)


def _is_plain(holder: fx.Node, like: fx.Node) -> bool:
    value = holder.meta["example_value"]
    is_call = holder.op in ("call_function", "call_method")
    return is_call and isinstance(value, torch.Tensor) and value.dtype == like.meta["example_value"].dtype


def _is_list(node: fx.Node) -> bool:
    """Return whether `node` returns several tensors, each made by itself, that are read one by one, each once."""
    value = node.meta.get("example_value")
    if not isinstance(value, list | tuple) or op_name(node) not in RETURNING_SEVERAL:
        return False
    picked = [user.args[1] for user in node.users if op_name(user) == "getitem"]
    return len(picked) == len(node.users) == len(set(picked))


def _is_fresh(node: fx.Node, aliases: Aliases) -> bool:
    """Return whether `node` made its memory itself, as no view does, or is one result of an op that did."""
    if node.op not in ("call_function", "call_method"):
        return False
    if op_name(node) == "getitem" and isinstance(node.args[0], fx.Node) and _is_list(node.args[0]):
        node = node.args[0]
    keys = aliases.keys_of(node)
    return all(keys.isdisjoint(aliases.keys_of(source)) for source in node.all_input_nodes)
