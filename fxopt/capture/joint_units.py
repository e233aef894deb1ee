"""A pass over the joint graph: a pointwise op and the layers around it become one op, in forward and in backward.

After `joint_outputs` the backward of a pointwise op between layers with adapters writes its gradients and its value,
and two backward ops read these: the one of the layer that reads the value, for its adapters, and the one of the layers
that computed what the pointwise op read. Nobody else reads them, so an op that does all three need not write the value,
nor read the gradients again for adapters.

In forward, a layer that alone reads the value of a pointwise op becomes one op with it.

Ops are known by what they declare: `<op>_backward_output`, `<op>_layers_backward` of the same arguments and those of
both others, a layer's backward by its arguments `dys` and `xs`; `<op>_layers` of the arguments of `<op>` and of a layer
but for its `xs`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.capture.joint_codes import NAMESPACE, argument_names
from fxopt.capture.joint_outputs import SPLIT, name_of
from fxopt.graph.edit import move_behind
from fxopt.graph.torch_private import schema_of

OUTPUT = "_backward_output"
LAYER = {"xs", "weights", "biases", "a", "b", "inputs", "owners"}
"""Arguments that a layer with adapters has, forward and backward."""


def join_unit_backwards(graph: fx.Graph) -> int:
    """Join the backward ops of pointwise ops and of the layers around them, and return how many were joined."""
    count = 0
    for node in list(graph.nodes):
        name = name_of(node) or ""
        packet = getattr(getattr(torch.ops, NAMESPACE), f"{name.removesuffix(OUTPUT)}_layers_backward", None)
        found = _find_layers(node) if name.endswith(OUTPUT) and packet is not None else None
        if found is not None:
            _join(node, packet, *found)
            count += 1
    return count


def join_units(graph: fx.Graph) -> int:
    """Join pointwise ops and the layers that alone read their values, and return how many were joined.

    To be run after `join_unit_backwards`: a backward that still reads the value keeps it apart.
    """
    count = 0
    for node in list(graph.nodes):
        name = name_of(node)
        packet = name and getattr(getattr(torch.ops, NAMESPACE), f"{name}_layers", None)
        layer = next(iter(node.users), None)
        if not packet or layer is None or len(node.users) != 1 or node.kwargs or layer.kwargs:
            continue
        names = argument_names(layer)
        if not set(names) >= LAYER or "dys" in names or layer.args[names.index("xs")] != [node]:
            continue
        given = dict(zip(argument_names(node), node.args, strict=True))
        given |= {name: item for name, item in zip(names, layer.args, strict=True) if name != "xs"}
        if not _takes(packet.default, given):
            continue
        with graph.inserting_before(layer):
            joined = graph.call_function(packet.default, tuple(given.values()))
        joined.meta = dict(layer.meta)
        layer.replace_all_uses_with(joined)
        graph.erase_node(layer)
        graph.erase_node(node)
        count += 1
    return count


def _takes(op: Any, given: dict[str, Any]) -> bool:
    """Return whether `op` has the arguments `given`, by name and in this order, and none of its tensors is missing."""
    arguments = schema_of(op).arguments
    missing = [a.name for a in arguments if str(a.type) == "Tensor" and given.get(a.name) is None]
    return [a.name for a in arguments] == list(given) and not missing


def _find_layers(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the backward of the layer that reads the value, and of those before, where these alone read `node`."""
    num_gradients = len(node.meta["val"]) - 1
    parts: dict[Any, fx.Node] = {user.args[1]: user for user in node.users}
    if set(parts) != set(range(num_gradients + 1)) or any(len(part.users) != 1 for part in parts.values()):
        return None
    *gradients, value = (parts[place] for place in range(num_gradients + 1))
    (after,) = value.users
    before, *others = (next(iter(part.users)) for part in gradients)
    given = [_given(layer) for layer in (after, before)]
    if after is before or any(other is not before for other in others) or not all(given):
        return None
    of_after, of_before = given
    is_plain = of_after["xs"] == [value] and of_before["dys"] == gradients
    return (after, before) if is_plain and not of_after["needs"][0] and len(of_before["xs"]) == 1 else None


def _given(node: fx.Node) -> dict[str, Any]:
    names = argument_names(node)
    is_layer = {"dys", *SPLIT} <= set(names)
    return dict(zip(names, node.args, strict=True)) if is_layer else {}


def _join(node: fx.Node, packet: Any, after: fx.Node, before: fx.Node) -> None:
    """Put one call of `packet` where the later of the layers is, and let what read either read it."""
    graph = node.graph
    first, last = (after, before) if after < before else (before, after)
    of_after = {name: item for name, item in _given(after).items() if name != "xs"}
    of_before = {name: item for name, item in _given(before).items() if name != "dys"}
    with graph.inserting_before(last):
        joined = graph.call_function(packet.default, (*node.args, *of_after.values(), *of_before.values()))
    joined.meta = dict(before.meta)
    joined.meta["val"] = [*after.meta["val"], *before.meta["val"]]
    for layer, start in ((after, 0), (before, len(after.meta["val"]))):
        places: dict[fx.Node, Any] = {user: user.args[1] for user in layer.users}
        for user, place in places.items():
            user.args = (joined, place + start)
    parts = list(node.users)
    for gone in (last, first, *parts, node):
        graph.erase_node(gone)
    move_behind(joined)
