"""A pass over the joint graph: a value that a backward needs again is written beside its own gradients.

Where a layer with adapters reads a pointwise op's result x, its backward needs x for the gradients of the adapters,
but only shape and dtype of it for the gradient of x. The pointwise op's backward comes next, and reads all that x is
computed from. So the layer's backward is split: first the gradient of x, then the pointwise op's backward, which writes
x too, then the other gradients. Else x would be computed again before, by one more pass over memory.

Ops are known by what they declare: a pointwise op by its tag, its backward by `<op>_backward_output`, which also
returns the value, and a backward that may be split by the arguments `xs` and `needs`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxopt.capture.joint_codes import NAMESPACE, are_alike, argument_names
from fxopt.graph.edit import move_behind
from fxopt.graph.torch_private import schema_of

SPLIT = ("xs", "weights", "biases", "a", "b", "needs")


def write_outputs_beside_gradients(graph: fx.Graph) -> int:
    """Split backward ops of layers that read a pointwise op's result, and return how many were split."""
    count = 0
    for node in list(graph.nodes):
        names = argument_names(node)
        if not set(SPLIT) <= set(names):
            continue
        given: dict[str, Any] = dict(zip(names, node.args, strict=True))
        found = _find_pair(node, given)
        if found is not None:
            _split(node, given, *found)
            count += 1
    return count


def _find_pair(node: fx.Node, given: dict[str, Any]) -> tuple[fx.Node, fx.Node] | None:
    """Return a tensor like the first of `xs`, and the backward op that computes its sources' gradients, or None.

    That of x has to go into the backward op and nowhere else, and something but it has to be needed.
    """
    value, needs = given["xs"][0], given["needs"]
    if not needs[0] or not any(needs[len(given["xs"]) :]) or any(needs[1 : len(given["xs"])]):
        return None
    name = name_of(value)
    if name is None or torch.Tag.pointwise not in value.target.tags:  # pyright: ignore
        return None
    if not hasattr(getattr(torch.ops, NAMESPACE), f"{name}_backward_output"):
        return None
    gradients = [user for user in node.users if user.args[1] == 0]
    if len(gradients) != 1 or len(gradients[0].users) != 1:
        return None
    (gradient,) = gradients
    (backward,) = gradient.users
    is_its = name_of(backward) == f"{name}_backward" and backward.args[0] is gradient
    read = list(backward.args[1 : 1 + len(value.args)])
    if not is_its or list(map(_first_of, read)) != list(map(_first_of, value.args)):
        return None
    like = next((item for item in read if isinstance(item, fx.Node) and are_alike(item, value)), None)
    return None if like is None else (like, backward)


def _first_of(item: Any) -> Any:
    """Return the name of a node, of one that computes the value of another again that of the other."""
    return item.meta.get("replays", item.name) if isinstance(item, fx.Node) else item


def _split(node: fx.Node, given: dict[str, Any], like: fx.Node, backward: fx.Node) -> None:
    """Put the gradient of x first, and the other gradients behind `backward`, which writes x."""
    graph, needs = node.graph, given["needs"]
    target: Any = node.target
    num_inputs = len(given["xs"])
    users: dict[Any, fx.Node] = {user.args[1]: user for user in node.users}
    with graph.inserting_before(backward):
        written = _call(graph, f"{name_of(backward)}_output", backward.args)
        value = graph.call_function(operator.getitem, (written, len(backward.meta["val"])))
        rest = given | {
            "xs": [value, *given["xs"][1:]],
            "needs": [False] * num_inputs + needs[num_inputs:],
        }
        later = graph.call_function(target, tuple(rest.values()))
    written.meta = dict(backward.meta)
    value.meta = {key: item for key, item in given["xs"][0].meta.items() if key in ("val", "tensor_meta")}
    written.meta["val"] = (*backward.meta["val"], value.meta["val"])
    later.meta = dict(node.meta)
    later.meta["val"] = list(node.meta["val"][1:])
    backward.replace_all_uses_with(written)
    graph.erase_node(backward)
    for place, user in users.items():
        if place:
            user.args = (later, place - 1)
    first = given | {
        "xs": [like, *given["xs"][1:]],
        "needs": [True] + [False] * (len(needs) - 1),
    }
    node.args = tuple(first.values())
    node.meta["val"] = list(node.meta["val"][:1])
    move_behind(later)


def _call(graph: fx.Graph, name: str, args: tuple[Any, ...]) -> fx.Node:
    return graph.call_function(getattr(getattr(torch.ops, NAMESPACE), name).default, args)


def name_of(node: Any) -> str | None:
    """Return the name of an op of ours, None of any other node."""
    return schema_of(node.target).name.partition("::")[2] if argument_names(node) else None
