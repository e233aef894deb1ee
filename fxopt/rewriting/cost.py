"""What a rewrite is worth: bytes moved before and after, and bytes that no longer exist."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from fxopt.graph.sizes import num_bytes_of
from fxopt.graph.storage import UNKNOWN, key_of
from fxopt.graph.view import tensors_of
from fxopt.rewriting.pattern import Match, Mismatch


def check_cost(match: Match) -> Mismatch | None:
    """Return a mismatch where one op in place of the matched nodes would move more bytes than they do."""
    before = traffic_of(match.nodes)
    ends = (*match.inputs, *match.outputs, *match.exports.values())
    after = sum(map(_num_bytes_in, ends))
    return match.fail(f"would move {after} bytes instead of {before}") if after > before else None


def sizes_in_bytes(nodes: Iterable[fx.Node]) -> int:
    """Return the bytes of the tensors `nodes` compute, views not counted; symbolic sizes by their hints."""
    sizes: dict[int, int] = {}
    num_bytes = 0
    for value in (value for node in nodes for value in tensors_of(node)):
        key = key_of(value)
        if key == UNKNOWN:
            num_bytes += num_bytes_of(value)
        else:
            sizes.setdefault(key, num_bytes_of(value))
    return num_bytes + sum(sizes.values())


def traffic_of(nodes: Iterable[fx.Node]) -> int:
    """Return the bytes that `nodes` read and write when each runs alone; views move nothing."""
    num_bytes = 0
    for node in nodes:
        sources = node.all_input_nodes
        if all(_known_keys(node).isdisjoint(_known_keys(source)) for source in sources):
            num_bytes += sum(map(_num_bytes_in, (*sources, node)))
    return num_bytes


def _num_bytes_in(node: fx.Node) -> int:
    return sum(map(num_bytes_of, tensors_of(node)))


def _known_keys(node: fx.Node) -> frozenset[int]:
    """Return the storages of the value of `node`; that of a tensor without one is nobody else's."""
    return frozenset(map(key_of, tensors_of(node))) - {UNKNOWN}
