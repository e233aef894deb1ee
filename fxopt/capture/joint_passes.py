"""Passes over the joint graph, in which the forward and the backward of a region stand together.

They know fxopt's ops by what these declare: the tag `torch.Tag.pointwise`, and an optional last argument
`dskip`, which an op adds to its first result before it rounds that.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

NAMESPACE = "fxopt"
SKIP_ARGUMENT = "dskip"


def mark_recomputed(graph: fx.Graph) -> None:
    """Mark fxopt's pointwise ops to be computed again in the backward pass instead of saved.

    Such an op reads what its own backward saves anyway, and its result is as large as they are: computing
    it again costs one pass over memory, saving it costs its bytes until the block's backward.
    """
    for node in graph.nodes:
        if _is_ours(node) and torch.Tag.pointwise in node.target.tags:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = 0


def fold_skip_gradients(graph: fx.Graph) -> int:
    """Give backward ops the gradient that is added to their first result, and return how many took one.

    A residual stream's gradient is the sum of what comes around a norm and what comes through it; added inside
    the norm's backward, it costs no pass over memory of its own.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    folded = 0
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
        found = _find_fold(node, order)
        if found is None:
            continue
        result, other = found
        backward = result.args[0]
        for moved in (backward, *sorted(backward.users, key=order.__getitem__)):
            node.prepend(moved)
        backward.kwargs = {**backward.kwargs, SKIP_ARGUMENT: other}
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        order = {item: place for place, item in enumerate(graph.nodes)}
        folded += 1
    return folded


def _find_fold(add: fx.Node, order: dict[fx.Node, int]) -> tuple[Any, fx.Node] | None:
    """Return the first result of a backward op that `add` adds to, and what it adds to it, or None."""
    if add.kwargs or len(add.args) != 2:
        return None
    for result, other in (add.args, add.args[::-1]):
        if not isinstance(result, fx.Node) or not isinstance(other, fx.Node) or result is other:
            continue
        if result.target is not operator.getitem or result.args[1] != 0 or len(result.users) != 1:
            continue
        backward = result.args[0]
        if (
            not isinstance(backward, fx.Node)
            or not _takes_skip(backward)
            or not _are_alike(add, result, other)
        ):
            continue
        used_before = any(
            order[user] < order[add] for item in backward.users if item is not result for user in item.users
        )
        if not used_before:
            return result, other
    return None


def _takes_skip(node: fx.Node) -> bool:
    if not _is_ours(node):
        return False
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    taken = len(node.args) >= len(names) or SKIP_ARGUMENT in node.kwargs
    return bool(names) and names[-1] == SKIP_ARGUMENT and not taken


def _are_alike(*nodes: fx.Node) -> bool:
    """Return whether all values have one shape and dtype: nothing is broadcast or promoted."""
    first, *others = (node.meta.get("val") for node in nodes)
    return isinstance(first, torch.Tensor) and all(
        isinstance(value, torch.Tensor) and value.shape == first.shape and value.dtype == first.dtype
        for value in others
    )


def _is_ours(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE
