"""Which storages live at each instant of one region's forward and backward, and the most they are together."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

from torch import fx

from fxopt.remat.joint import Joint, is_view, rounded
from fxopt.remat.menu import Choice


@dataclasses.dataclass(frozen=True)
class Working:
    """What one region needs under one choice, in bytes.

    `forward` and `backward` are the most that lives at an instant, the region's own input and what it has saved
    among it; `saved` stays on the device between the two, `offloaded` on the host, and in memory that is kept for
    it throughout backward; `gradients` of parameters stay after.
    """

    forward: int
    backward: int
    saved: int
    offloaded: int
    gradients: int


def simulate(joint: Joint, choice: Choice) -> Working:
    """Return what `joint` needs in memory where `choice` is carried out."""
    saved = {joint.forward[place] for place in choice.saved}
    recomputed = {joint.forward[place] for place in choice.recomputed}
    kept = frozenset(storage for node in saved for storage in joint.storages[node]) - joint.held
    gone = frozenset(s for place in choice.offloaded for s in joint.storages[joint.forward[place]]) & kept
    results = frozenset(storage for node in joint.results for storage in joint.storages[node])
    forward = _peak(
        joint,
        _forward_order(joint, saved),
        joint.chained,
        kept | results | joint.chained,
        {*saved, *joint.results},
    )
    tangents = [node for node in joint.backward if node.op == "placeholder"]
    incoming = frozenset(storage for node in tangents for storage in joint.storages[node])
    gradients = frozenset(storage for node in joint.gradients for storage in joint.storages[node])
    order = _backward_order(joint, recomputed)
    backward = _peak(joint, order, kept | incoming, gradients | gone, {*saved, *joint.gradients})
    after = gradients - joint.passed_on
    return Working(forward, backward, _sum(joint, kept - gone), _sum(joint, gone), _sum(joint, after))


def _forward_order(joint: Joint, saved: Collection[fx.Node]) -> list[fx.Node]:
    wanted: set[fx.Node] = set()
    queue = [*joint.results, *saved]
    while queue:
        node = queue.pop()
        if node not in wanted:
            wanted.add(node)
            queue.extend(node.all_input_nodes)
    return [node for node in joint.forward if node in wanted]


def _backward_order(joint: Joint, recomputed: Collection[fx.Node]) -> list[fx.Node]:
    """Return the nodes of backward in order, each value that is computed again right before its first use."""
    order: dict[fx.Node, None] = {}
    for node in joint.backward:
        stack = [node]
        while stack:
            missing = [i for i in stack[-1].all_input_nodes if i in recomputed and i not in order]
            if missing:
                stack.append(missing[0])
            else:
                order.setdefault(stack.pop())
    return list(order)


def _peak(
    joint: Joint,
    order: list[fx.Node],
    alive: Iterable[int],
    keep: Collection[int],
    materialized: Collection[fx.Node],
) -> int:
    """Return the most that lives at once while `order` runs, `alive` from its start and `keep` to its end."""
    inlined = {node for node in order if node in joint.fused and _is_inlined(joint, node, materialized)}
    last: dict[int, int] = {}
    for number, node in enumerate(order):
        for used in (node, *node.all_input_nodes):
            last.update(dict.fromkeys(joint.storages[used], number))
    dying: dict[int, list[int]] = {}
    for storage, number in last.items():
        if storage not in keep:
            dying.setdefault(number, []).append(storage)
    living = set(alive)
    kept = joint.held.union(living)
    total = most = _sum(joint, living)
    for number, node in enumerate(order):
        if node.op == "call_function" and node not in inlined:
            free = set(dying.get(number, ())) - kept
            form = next(
                (form for form in joint.overwriting.get(node, ()) if free.issuperset(form.taken)), None
            )
            workspace = joint.workspaces.get(node, 0) if form is None else form.workspace
            new = set(joint.storages[node]) - living - joint.held
            living |= new
            total += _sum(joint, new)
            left = 0 if form is None else _sum(joint, form.left)  # in memory that is counted already
            most = max(most, total - left + rounded(workspace))
        gone = living.intersection(dying.get(number, ()))
        living -= gone
        total -= _sum(joint, gone)
    return most


def _is_inlined(joint: Joint, node: fx.Node, materialized: Collection[fx.Node]) -> bool:
    """Return whether `node` only ever lives within a kernel: all that reads it is fused with it."""
    if node in materialized:
        return False
    return all(
        user in joint.fused or (is_view(user, joint.storages) and _is_inlined(joint, user, materialized))
        for user in node.users
    )


def _sum(joint: Joint, storages: Iterable[int]) -> int:
    return sum(rounded(joint.sizes[storage]) for storage in storages)
