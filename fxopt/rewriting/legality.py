"""Whether a match may be replaced where it stands: who else reads its values, what changes between its nodes.

`GraphState` is read off a graph once per sweep; `judge` turns bindings into a `Match`, or says why not.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

from torch import fx

from fxopt.graph import vocabulary
from fxopt.graph.purity import MODE_SWITCHES, mutated_inputs  # pyright: ignore[reportUnknownVariableType]
from fxopt.graph.storage import UNKNOWN, keys_of
from fxopt.graph.torch_private import GET_DATA
from fxopt.graph.view import tensors_of
from fxopt.rewriting.matcher import Bindings
from fxopt.rewriting.modes import Mode, switched
from fxopt.rewriting.pattern import Match, Mismatch, Pattern
from fxopt.rewriting.trees import name_of

LAYOUT_OPS = ("cast", "reshape", "contiguous", "transpose", "permute", "unsqueeze", "squeeze", "getitem")
LAYOUT = frozenset(vocabulary.BY_NAME[name].target for name in LAYOUT_OPS)
"""What may stand between a kept value and the graph's output: what computes nothing new."""


@dataclasses.dataclass
class GraphState:
    """The nodes of a graph by place and by op, the mode each runs in, and where storages are written to."""

    places: dict[fx.Node, int]
    modes: dict[fx.Node, Mode]
    by_target: dict[Any, list[fx.Node]]
    writes: list[tuple[int, frozenset[int]]]
    data: frozenset[int] = frozenset()
    """Storages that are read as `.data`: autograd is not told of writes to that."""
    erased: set[fx.Node] = dataclasses.field(default_factory=set[fx.Node])

    def add(self, node: fx.Node, at: fx.Node) -> None:
        """Note a new node that stands just before `at`."""
        self.places[node], self.modes[node] = self.places[at], self.modes[at]

    def written_between(self, first: int, last: float) -> frozenset[int]:
        """Return the storages that nodes after `first` and before `last` write to."""
        start = bisect.bisect_right(self.writes, first, key=lambda write: write[0])
        stop = bisect.bisect_left(self.writes, last, key=lambda write: write[0])
        return frozenset[int]().union(*(storages for _, storages in self.writes[start:stop]))

    @property
    def written(self) -> frozenset[int]:
        """The storages that any node writes to."""
        return frozenset[int]().union(*(storages for _, storages in self.writes))


def read_state(graph: fx.Graph) -> GraphState:
    """Return the state of `graph` as it stands."""
    state = GraphState({}, {}, {}, [])
    mode = Mode()
    for place, node in enumerate(graph.nodes):
        if node.target in MODE_SWITCHES:
            mode = switched(mode, node)
        state.places[node], state.modes[node] = place, mode
        if node.op == "call_function":
            state.by_target.setdefault(node.target, []).append(node)
        written = mutated_inputs(node)
        if node.target is GET_DATA:
            state.data |= keys_of(node)
        if written:
            state.writes.append((place, frozenset[int]().union(*map(keys_of, written))))
    return state


def judge(
    pattern: Pattern, bindings: Bindings, outputs: tuple[fx.Node, ...], state: GraphState, lazy_outputs: bool
) -> Match | Mismatch:
    """Return the match that `bindings` make, or the reason why it may not be replaced."""
    nodes = tuple(sorted(bindings.nodes, key=state.places.__getitem__))
    refuse = functools.partial(_refuse, pattern, len(nodes))
    mode = state.modes[outputs[0]]
    for node in nodes:
        if state.modes[node] != mode:
            reason = f"{node.name} runs under another autocast or gradient mode than {outputs[0].name}"
            return refuse(reason, node)
    kept: set[fx.Node] = set()
    exports: dict[str, fx.Node] = {}
    for node in nodes:
        outside = [user for user in node.users if user not in bindings.nodes]
        if node in outputs or not outside:
            continue
        policy = bindings.nodes[node]
        read_by = find_reader(outside)
        told = "returned" if read_by.op == "output" else f"read by {describe_node(read_by)}"
        reader = f"{describe_node(node)} is also {told}"
        if policy is None or policy.policy == "refuse":
            return refuse(reader, node, read_by)
        if policy.policy == "export":
            exports[policy.name] = node
        elif policy.cheap or (lazy_outputs and feeds_output_only(outside)):
            kept.add(node)
        else:
            needed = "only the graph's output" if lazy_outputs else "no reader outside (nothing is lazy here)"
            return refuse(f"{reader}, expected {needed}", node, read_by)
    for node in reversed(nodes):
        if any(user in kept for user in node.users):
            kept.add(node)
    match = Match(
        pattern,
        nodes,
        outputs,
        bindings.values,
        tuple(node for node in nodes if node in kept),
        exports,
        mode.autocast[-1] if mode.autocast else None,
    )
    for node in match.inputs:
        kind = find_own_arithmetic(node)
        if kind:
            reason = (
                f"{node.name} is of class {kind}, which has arithmetic of its own, expected a plain tensor"
            )
            return refuse(reason, node)
    at = find_insertion(match, state)
    if at is None:
        reason = f"a value is read before the last input of {outputs[-1].name} is computed"
        return refuse(reason, *outputs)
    found = _find_write(match, at, state)
    if found is not None:
        node, when = found
        reason = f"{node.name} is written to in place {when}"
        return refuse(reason, node)
    return match


def _refuse(pattern: Pattern, progress: int, reason: str, *nodes: fx.Node) -> Mismatch:
    return Mismatch(pattern.name, reason, nodes, progress, has_rare_op=True, has_site=True)


def _find_write(match: Match, at: fx.Node, state: GraphState) -> tuple[fx.Node, str] | None:
    """Return a node whose memory is written to where its match may not stand, before `at`, and when; or None.

    Afterwards only what is known to be written to counts: in-place ops of unknown storage are everywhere, and autograd
    raises an error where one of them changes what a backward pass reads. It is not told of writes to `.data`.
    """
    first, last = state.places[match.nodes[0]], state.places[at]
    between = state.written_between(first, last)
    later = state.written_between(last, math.inf) - {UNKNOWN}
    for node in (*match.inputs, *match.nodes):
        keys = keys_of(node)
        if _may_be_written(keys, between):
            return node, "between the nodes of the match"
        if not keys.isdisjoint(later if node in match.inputs else later & state.data):
            return node, "after the match, whose gradients may read it"
    return None


def find_own_arithmetic(node: fx.Node) -> str:
    """Return the class of a tensor in the value of `node` that is made of others, as quantized ones are; "" if none.

    Such a class says what each op does to it, and knows none of fxopt's.
    """
    made = (type(tensor).__name__ for tensor in tensors_of(node) if hasattr(tensor, "__tensor_flatten__"))
    return next(made, "")


def _may_be_written(keys: frozenset[int], written: frozenset[int]) -> bool:
    """Return whether a write to the storages `written` may change `keys`: any may where one is not known."""
    return bool(keys and written) and (UNKNOWN in keys or UNKNOWN in written or not keys.isdisjoint(written))


def find_insertion(match: Match, state: GraphState) -> fx.Node | None:
    """Return the matched node before which the replacement may stand: after inputs, before readers."""
    if len(match.outputs) == 1 and not match.exports:
        return match.outputs[0]
    places = state.places
    last_input = max((places[node] for node in match.inputs), default=-1)
    values = (*match.outputs, *match.exports.values())
    inside = set(match.nodes)
    readers = [places[user] for value in values for user in value.users if user not in inside]
    first_reader = min(readers, default=max(map(places.__getitem__, match.nodes)) + 1)
    fitting = [node for node in match.nodes if last_input < places[node] < first_reader]
    return fitting[-1] if fitting else None


def feeds_output_only(readers: Iterable[fx.Node]) -> bool:
    """Return whether all that follows from `readers` is layout and casts, and ends in the graph's output."""
    seen: dict[fx.Node, None] = dict.fromkeys(readers)
    queue = list(seen)
    while queue:
        node = queue.pop()
        if node.op == "output":
            continue
        if node.target not in LAYOUT or not node.users:
            return False
        queue.extend(user for user in node.users if user not in seen)
        seen.update(dict.fromkeys(node.users))
    return True


def find_reader(readers: Iterable[fx.Node]) -> fx.Node:
    """Return the first of `readers` that is no layout or cast, or that follows one; the graph's output comes last."""
    seen: dict[fx.Node, None] = dict.fromkeys(readers)
    queue = list(seen)
    found = queue[0]
    while queue:
        node = queue.pop(0)
        if node.op == "output":
            found = node
            continue
        if node.target not in LAYOUT:
            return node
        queue.extend(user for user in node.users if user not in seen)
        seen.update(dict.fromkeys(node.users))
    return found


def describe_node(node: fx.Node) -> str:
    """Return a node's op, as mismatches print it beside the line: canonical nodes may have names of no source."""
    if node.op == "output":
        return "the graph's output"
    return name_of(node.target) if node.op == "call_function" else str(node.target)
