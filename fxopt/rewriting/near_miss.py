"""Why a known form was left alone: the pattern that came nearest and the first constraint that failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from fxopt.graph.view import find_subgraphs
from fxopt.rewriting.legality import GraphState, read_state
from fxopt.rewriting.pattern import Mismatch, Pattern
from fxopt.rewriting.rewrite import find_match
from fxopt.rewriting.roots import find_anchor_targets, find_roots
from fxopt.rewriting.terms import name_of
from fxopt.rewriting.trace import Trace


def find_nearest_miss(
    gm: fx.GraphModule, patterns: Sequence[Pattern], anchor_origin: str, lazy_outputs: bool = True
) -> Mismatch:
    """Return the mismatch that came furthest of all `patterns` around the stock node `anchor_origin` of `gm`.

    A stock node in the body of a higher-order op is named "submodule/node".
    """
    nearest = Mismatch("", "no pattern has an op of this form")
    for state, anchor in _find_nodes(gm, anchor_origin):
        is_lazy = lazy_outputs and "/" not in anchor_origin
        for pattern in patterns:
            mismatch = _find_miss(pattern, anchor, state, is_lazy)
            if mismatch is not None and (mismatch.nearness > nearest.nearness or not nearest.pattern):
                nearest = mismatch
    return nearest


def _find_nodes(gm: fx.GraphModule, origin: str) -> Iterator[tuple[GraphState, fx.Node]]:
    for prefix, body in find_subgraphs(gm):
        found = [
            node for node in body.graph.nodes if origin in node.meta.get("origins", (f"{prefix}{node.name}",))
        ]
        if found:
            state = read_state(body.graph)
            yield from ((state, node) for node in found)


def _find_miss(pattern: Pattern, anchor: fx.Node, state: GraphState, lazy_outputs: bool) -> Mismatch | None:
    if anchor.op != "call_function" or anchor.target not in pattern.targets:
        return None
    counts = {target: len(nodes) for target, nodes in state.by_target.items()}
    trace = Trace(pattern.name, find_anchor_targets(pattern.terms[0], counts) or frozenset())
    roots = find_roots(pattern, anchor, lambda node: node.target in pattern.targets)
    if not roots:
        expected = " or ".join(sorted(map(name_of, pattern.terms[0].heads)))
        got = " and ".join(dict.fromkeys(map(_name, anchor.users))) or "nothing"
        reason = f"expected {expected} above {name_of(anchor.target)}, got {got}"
        return Mismatch(pattern.name, reason, (anchor, *anchor.users), 0, anchor.target in trace.anchors)
    for root in roots:
        match = find_match(pattern, root, anchor, state, lazy_outputs, trace)
        if match is not None:
            reason = f"matches {name_of(root.target)} {root.name}, but was not applied"
            return Mismatch(pattern.name, reason, match.outputs, len(match.nodes), True)
    return trace.nearest


def _name(node: fx.Node) -> str:
    if node.op == "output":
        return "the graph's output"
    return name_of(node.target) if node.op == "call_function" else str(node.target)
