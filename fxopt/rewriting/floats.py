"""Floats that differ from layer to layer, as an eps may: capture makes symbols of them, and patterns take numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.graph.torch_private import float_seen
from fxopt.graph.work import kept_for_work
from fxopt.rewriting.pattern import Pattern
from fxopt.rewriting.rewrite import MatchContext, apply_patterns


def fix_floats(gm: fx.GraphModule, patterns: Sequence[Pattern], lazy_outputs: bool) -> None:
    """Make a number of each symbolic float in `gm` that one of `patterns` takes, in place and under a guard.

    Each of its values then has a capture of its own. What no pattern takes stays a symbol, and its captures shared.
    """
    if not _find_floats(gm.graph):
        return
    trial = kept_for_work(gm)()
    for node, value in _find_floats(trial.graph).items():
        _put(node, float_seen(value))
    apply_patterns(trial, patterns, MatchContext(lazy_outputs))
    left = {node.name for node in trial.graph.nodes}
    floats = _find_floats(gm.graph)
    taken = [node for node in floats if any(user.name not in left for user in _find_readers(node, floats))]
    for node in taken:
        _put(node, float(floats[node]))  # which makes the guard


def _find_readers(node: fx.Node, floats: Collection[fx.Node]) -> Iterator[fx.Node]:
    """Yield what reads `node` and is no float, directly or through floats that are computed from it."""
    for user in node.users:
        if user in floats:
            yield from _find_readers(user, floats)
        else:
            yield user


def _find_floats(graph: fx.Graph) -> dict[fx.Node, torch.SymFloat]:
    """Return the nodes that compute a float that is a symbol, of which the value in the captured call is known."""
    values = {node: node.meta.get("example_value") for node in graph.nodes if node.op.startswith("call_")}
    return {
        node: value
        for node, value in values.items()
        if isinstance(value, torch.SymFloat) and float_seen(value) is not None
    }


def _put(node: fx.Node, number: float | None) -> None:
    """Put `number` where `node` is read."""

    def put(item: fx.Node) -> Any:
        return number if item is node else item

    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg(user.args, put), fx.map_arg(user.kwargs, put)
    node.graph.erase_node(node)
