"""Cut the captured model at its blocks: what stands after the last of them is the tail fxopt compiles.

The model is captured once with each block as one leaf call. What stands before the blocks (embedding,
masks, rotary tables) is left to run as stock Python, because under capture transformers builds mask
tensors that it avoids otherwise; the leaf calls whose values the tail reads become its inputs.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable

from torch import fx

from fxopt.capture.places import with_place
from fxopt.graph.aliases import Aliases
from fxopt.graph.names import op_name
from fxopt.graph.purity import MODE_SWITCHES, is_pure, mutated_inputs
from fxopt.graph.view import location_of


class TailRefusal(Exception):
    """The tail of this model cannot be compiled; the text is the reason."""


@dataclasses.dataclass(frozen=True)
class Tail:
    """The tail as a graph of its own.

    `graph` takes the values of some of the leaf calls, then the captured graph's placeholders
    numbered `placeholders`. Each of `leaves` is the number of a call, in calling order, and the item of
    the tuple it returned, or None where it returned a tensor. `calls` are the captured graph's leaf calls.
    """

    graph: fx.GraphModule
    calls: tuple[fx.Node, ...]
    leaves: tuple[tuple[int, int | None], ...]
    placeholders: tuple[int, ...]


def cut_tail(captured: fx.GraphModule, is_leaf: Callable[[fx.Node], bool]) -> Tail:
    """Return the part of `captured` after its leaf calls.

    Raises:
        TailRefusal: there is no leaf call, a leaf hides in a nested graph, or the tail needs what only an
            impure node before the blocks computes, or memory that is written to there.
    """
    nodes = list(captured.graph.nodes)
    leaf_nodes = [node for node in nodes if is_leaf(node)]
    if not leaf_nodes:
        raise TailRefusal(
            "no block was called, as where they are skipped, wrapped after fxopt.optimize, or called by their forward"
        )
    for module in captured.modules():
        if not isinstance(module, fx.GraphModule) or module is captured:
            continue
        nested = next((node for node in module.graph.nodes if is_leaf(node)), None)
        if nested is not None:
            raise TailRefusal(
                f"a block is called inside a nested graph at {location_of(nested)} (checkpointing around several)"
            )
    needed = _ancestors(nodes[-1], stop=set(leaf_nodes))
    last = nodes.index(leaf_nodes[-1])
    for node in nodes:
        if node in needed and _is_put(node):
            raise TailRefusal(
                with_place("it reads what a block put into a mapping that it was given", location_of(node))
            )
    for node in nodes[:last]:
        if node in needed and node not in leaf_nodes and not is_repeatable(node):
            raise TailRefusal(
                f"it reads {op_name(node) or node.name} at {location_of(node)} "
                "(before the last block), which may give another value when it is computed again"
            )
    _check_no_writes(captured.graph, nodes[:last], needed, set(leaf_nodes))
    for node in nodes[last:]:
        if node not in needed and not is_repeatable(node) and not _is_put(node):
            needed.add(node)
            needed |= _ancestors(node, stop=set(leaf_nodes))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    leaves: list[tuple[int, int | None]] = []
    for index, leaf in enumerate(leaf_nodes):
        for item, value in _values_of(leaf):
            if value not in needed:
                continue
            copy = graph.placeholder(f"block_{index}" if item is None else f"block_{index}_{item}")
            copy.meta = {
                key: value.meta[key] for key in ("example_value", "stack_trace") if key in value.meta
            }
            copies[value] = copy
            leaves.append((index, item))
    placeholders: list[int] = []
    all_placeholders = [node for node in nodes if node.op == "placeholder"]
    for index, node in enumerate(all_placeholders):
        if node in needed:
            placeholders.append(index)
            copies[node] = graph.node_copy(node)
    for node in nodes:
        if node in copies or node.op == "placeholder" or node in leaf_nodes:
            continue
        if node in needed or node.target in MODE_SWITCHES:
            copies[node] = graph.node_copy(node, lambda old: copies[old])
    graph.lint()
    tail = fx.GraphModule(captured, graph)
    return Tail(tail, tuple(leaf_nodes), tuple(leaves), tuple(placeholders))


def _check_no_writes(
    graph: fx.Graph, trunk: list[fx.Node], needed: set[fx.Node], leaf_nodes: set[fx.Node]
) -> None:
    """Refuse where the trunk writes to memory that the tail reads: computed again, it would be another value."""
    aliases = Aliases(graph)
    read: set[int] = set()
    for node in needed - leaf_nodes:
        if not any(source in leaf_nodes for source in node.all_input_nodes):
            read |= aliases.keys_of(node)
    for node in trunk:
        if node in leaf_nodes:
            continue
        for written in mutated_inputs(node):
            if not read.isdisjoint(aliases.keys_of(written)):
                raise TailRefusal(
                    f"it reads {written.name}, which {op_name(node) or node.name} at {location_of(node)} writes to in "
                    "place, before the last block"
                )


def _values_of(leaf: fx.Node) -> list[tuple[int | None, fx.Node]]:
    """Return the tensors of a leaf call: itself, or the items taken from the tuple it returned."""
    if not isinstance(leaf.meta.get("example_value"), tuple | list):
        return [(None, leaf)]
    values: list[tuple[int | None, fx.Node]] = []
    for user in leaf.users:
        if user.target is not operator.getitem or not isinstance(user.args[1], int):
            raise TailRefusal(
                f"a block's tuple is used whole, by {op_name(user) or user.name} at {location_of(user)}"
            )
        values.append((user.args[1], user))
    return values


def _ancestors(node: fx.Node, stop: set[fx.Node]) -> set[fx.Node]:
    seen = {node}
    queue = [node]
    while queue:
        current = queue.pop()
        if current in stop:
            continue
        for argument in current.all_input_nodes:
            if argument not in seen:
                seen.add(argument)
                queue.append(argument)
    return seen


def _is_put(node: fx.Node) -> bool:
    """Return whether `node` takes what a block put into a mapping, for the blocks that follow."""
    return getattr(node.target, "fxopt_put", False)


def is_repeatable(node: fx.Node) -> bool:
    """Return whether running `node` a second time changes nothing and gives the same value."""
    return node.op in ("placeholder", "output") or node.target in MODE_SWITCHES or is_pure(node)
