"""Passes over the joint graph, in which the forward and the backward of a region stand together.

They know fxopt's ops by what these declare: the tag `torch.Tag.pointwise`, an optional last argument `dskip`, which an
op adds to its first result before it rounds that, an argument `xs` of values that may be computed again, a second
op by the name of `<op>_output_<n>`, which computes that output alone, `<op>_output`, which computes any one output by
large products, and `<op>_backward`, whose arguments are kept for it anyway.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fxopt.capture.joint_codes import NAMESPACE, are_alike, argument_names, is_ours, read_codes
from fxopt.capture.joint_outputs import write_outputs_beside_gradients
from fxopt.capture.joint_parts import copy_saved_parts
from fxopt.capture.joint_units import join_unit_backwards, join_units
from fxopt.capture.planning import Mark
from fxopt.graph.backward import find_backward
from fxopt.graph.torch_private import OpOverload, schema_of
from fxopt.kernels.launch import DECLARED

SKIP_ARGUMENT = "dskip"
REPLAYED_ARGUMENT = "xs"
LAYOUT_OPS = frozenset(
    {
        "_to_copy",
        "convert_element_type",
        "view",
        "reshape",
        "_unsafe_view",
        "cat",
        "t",
        "transpose",
        "permute",
    }
)
"""Ops between an op of ours and what it reads that cost next to nothing to do again."""


def prepare_joint(graph: fx.Graph, mark: Mark | None = None, held: frozenset[int] = frozenset()) -> str:
    """Run all passes over the joint graph and return what tells its plan apart, "" where nobody plans."""
    read_codes(graph)
    fold_skip_gradients(graph)
    decides = mark is not None and mark.decides
    if decides:
        replay_all(graph)
    else:
        replay_inputs(graph)
    write_outputs_beside_gradients(graph)
    join_unit_backwards(graph)
    join_units(graph)
    copy_saved_parts(graph, find_backward(graph.nodes))
    if not decides:
        mark_recomputed(graph)
    forget_traced_inputs(graph)
    return "" if mark is None else mark.show(graph, held)


def forget_traced_inputs(graph: fx.Graph) -> None:
    """Drop what fxopt's ops were traced with: Inductor lays inputs out as these were, also those that took their place.

    Without it, it goes by the values of the nodes that are read.
    """
    for node in graph.nodes:
        if is_ours(node):
            node.meta.pop("eager_input_vals", None)


def replay_inputs(graph: fx.Graph) -> int:
    """Let backward ops read norms computed again from what is saved anyway; return how many norms are.

    Where a norm's result is read by an op that takes its `xs` so, stock and a plain partition save both the norm's
    input and its result. Computing the result again costs one pass over memory. So is what an op reads of weights
    alone, cast and joined.
    """
    in_backward = find_backward(graph.nodes)
    replays = Replays()
    for node in list(graph.nodes):
        if not is_ours(node) or node not in in_backward:
            continue
        target: Any = node.target
        names = [argument.name for argument in schema_of(target).arguments]
        if REPLAYED_ARGUMENT not in names:
            continue
        place = names.index(REPLAYED_ARGUMENT)
        read = [_replay(item, replays) or item for item in node.args[place]]
        node.args = (*node.args[:place], read, *node.args[place + 1 :])
        for item in node.all_input_nodes:
            if item not in in_backward:
                _mark_layout(item)
    return sum(node.target is operator.getitem for node in replays)


def replay_all(graph: fx.Graph) -> None:
    """Let all of backward read norms and single layers computed again, and note at each what it stands for.

    Whether one is computed again or saved is the planner's to say: where it is saved, `meta["replays"]` names the
    forward node that backward shall read after all.
    """
    in_backward = find_backward(graph.nodes)
    replays = Replays(with_products=True)
    for node in list(graph.nodes):
        if node not in in_backward or node.op == "output":
            continue
        for item in node.all_input_nodes:
            new = None if item in in_backward else _replay(item, replays)
            if new is not None:
                node.replace_input_with(item, new)
    for item, new in replays.items():
        new.meta["replays"] = item.name


class Replays(dict[fx.Node, fx.Node]):
    """What computes the value of a node again; large products only if it is `with_products`."""

    def __init__(self, *, with_products: bool = False) -> None:
        super().__init__()
        self.with_products = with_products


def _replay(node: fx.Node, replays: Replays) -> fx.Node | None:
    """Return a node that computes the value of `node` again, or None where no op is declared that could."""
    if node in replays:
        return replays[node]
    new: fx.Node | None = None
    if node.target is operator.getitem:
        new = _replay_output(node, replays)
    elif _is_layout(node) and len(tensors := _tensors_read_by(node)) == 1:
        source = _replay(tensors[0], replays)
        if source is not None:
            with node.graph.inserting_after(_later(source, node)):
                new = node.graph.node_copy(node, lambda item: source if item is tensors[0] else item)
            new.meta = dict(node.meta)
    if new is not None:
        _must_recompute(new)
        replays[node] = new
    return new


def _tensors_read_by(node: fx.Node) -> list[fx.Node]:
    """Return what `node` reads, sizes left out."""
    return [item for item in node.all_input_nodes if not isinstance(item.meta.get("val"), torch.SymInt)]


def _later(a: fx.Node, b: fx.Node) -> fx.Node:
    return a if b < a else b


def _replay_output(node: fx.Node, replays: Replays) -> fx.Node | None:
    """Return a call of the op that computes this output of an op of ours alone, inserted after `node`.

    What it reads that its own backward does not keep is computed again too, or cast again from what is saved.
    """
    source, place = node.args
    if not isinstance(source, fx.Node) or not is_ours(source):
        return None
    forward: Any = source.target
    name = schema_of(forward).name.partition("::")[2]
    declared = DECLARED.get(forward)
    if declared is not None and declared.output is not None and not source.kwargs:
        arguments = declared.output(place, *source.args) if replays.with_products else None
        if arguments is None:
            return None
        return _replay_product(f"{name}_output", arguments, node, replays)
    packet = getattr(getattr(torch.ops, NAMESPACE), f"{name}_output_{place}", None)
    if packet is None:
        return None
    given: dict[str, Any] = dict(
        zip((argument.name for argument in schema_of(forward).arguments), source.args, strict=False)
    )
    given.update(source.kwargs)
    outputs = {f"output_{user.args[1]}": user for user in source.users if user.target is operator.getitem}
    given.update(outputs)
    wanted = [argument.name for argument in schema_of(packet.default).arguments]
    if any(argument not in given for argument in wanted):
        return None
    read = [given[argument] for argument in wanted if argument in outputs]
    backward = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward", None)
    for argument in wanted:
        item = given[argument]
        if isinstance(item, fx.Node) and argument not in outputs and not _is_read_by(backward, item):
            given[argument] = _read_again(item, replays)
            read.append(given[argument])
    last = functools.reduce(_later, read, node)
    with node.graph.inserting_after(last):
        new = node.graph.call_function(packet.default, tuple(given[argument] for argument in wanted))
    new.meta = dict(node.meta)
    return new


def _replay_product(name: str, arguments: tuple[Any, ...], node: fx.Node, replays: Replays) -> fx.Node:
    """Return a call of the op called `name`, inserted after `node` and whatever it reads that is computed again."""
    read: list[fx.Node] = []

    def again(item: fx.Node) -> fx.Node:
        new = _replay(item, replays) or item
        read.append(new)
        return new

    arguments = fx.map_arg(arguments, again)  # pyright: ignore[reportAssignmentType]
    with node.graph.inserting_after(functools.reduce(_later, read, node)):
        new = node.graph.call_function(getattr(getattr(torch.ops, NAMESPACE), name).default, arguments)
    new.meta = dict(node.meta)
    return new


def _is_read_by(packet: Any, node: fx.Node) -> bool:
    """Return whether the op of `packet` reads `node`."""
    return packet is not None and any(user.target is packet.default for user in node.users)


def _read_again(node: fx.Node, replays: Replays) -> fx.Node:
    """Return `node` computed again; where no op is declared that could, a wider cast of what it was cast from."""
    new = _replay(node, replays)
    if new is not None or not _is_layout(node) or len(_tensors_read_by(node)) != 1:
        return new or node
    (source,) = _tensors_read_by(node)
    value, wide = source.meta["val"], node.meta["val"]
    if value.numel() * value.element_size() > wide.numel() * wide.element_size():
        return node
    again = _read_again(source, replays)
    with node.graph.inserting_after(_later(again, node)):
        new = node.graph.node_copy(node, lambda item: again if item is source else item)
    new.meta = dict(node.meta)
    _must_recompute(new)
    replays[node] = new
    return new


def _mark_layout(node: fx.Node) -> None:
    """Mark casts and joins of weights, and of what is computed again anyway, to be done again too."""
    if not _is_layout(node) or "recompute" in node.meta:
        return
    for source in node.all_input_nodes:
        _mark_layout(source)
    if all(
        source.op == "placeholder" or "recompute" in source.meta or _is_recomputed(source)
        for source in node.all_input_nodes
    ):
        _must_recompute(node)


def _is_layout(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, OpOverload) and schema_of(target).name.partition("::")[2] in LAYOUT_OPS


def _is_recomputed(node: fx.Node) -> bool:
    return is_ours(node) and torch.Tag.pointwise in node.target.tags  # pyright: ignore


def _must_recompute(node: fx.Node) -> None:
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    node.meta["ac_graph_id"] = 0


def mark_recomputed(graph: fx.Graph) -> None:
    """Mark fxopt's pointwise ops to be computed again in the backward pass instead of saved.

    Such an op reads what its own backward saves anyway, and its result is as large as they are: computing
    it again costs one pass over memory, saving it costs its bytes until the block's backward. An op of several
    outputs has its whole result computed again where its backward reads its inputs, and none of its outputs.
    """
    for node in graph.nodes:
        if _is_recomputed(node):
            _must_recompute(node)
            for output in _repeatable_outputs(node):
                _must_recompute(output)
                for user in output.users:
                    _mark_layout(user)


def _repeatable_outputs(node: fx.Node) -> list[fx.Node]:
    """Return the outputs of an op whose backward keeps all that they are computed from, and reads none of them."""
    outputs = [user for user in node.users if user.target is operator.getitem]
    name = f"{schema_of(node.target).name.partition('::')[2]}_backward"  # pyright: ignore
    backward = getattr(getattr(torch.ops, NAMESPACE), name, None)
    target = None if backward is None else backward.default
    for value in (*node.all_input_nodes, *outputs):
        is_read = any(user.target is target for user in value.users)
        if is_read == (value in outputs) and value.op != "placeholder":
            return []
    return outputs


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
            or not are_alike(add, result, other)
        ):
            continue
        used_before = any(
            order[user] < order[add] for item in backward.users if item is not result for user in item.users
        )
        if not used_before:
            return result, other
    return None


def _takes_skip(node: fx.Node) -> bool:
    names = argument_names(node)
    taken = len(node.args) >= len(names) or SKIP_ARGUMENT in node.kwargs
    return bool(names) and names[-1] == SKIP_ARGUMENT and not taken
