"""What a rewrite is worth: bytes moved before and after, and bytes that no longer exist."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fxopt.graph.view import is_tensor
from fxopt.rewriting.legality import storage_of
from fxopt.rewriting.pattern import Match, Mismatch


def check_cost(match: Match) -> Mismatch | None:
    """Return a mismatch where one op in place of the matched nodes would move more bytes than they do."""
    before = traffic_of(match.nodes)
    ends = (*match.inputs, *match.outputs, *match.exports.values())
    after = sum(num_bytes_of(node.meta["example_value"]) for node in ends if is_tensor(node))
    return match.fail(f"would move {after} bytes instead of {before}") if after > before else None


def sizes_in_bytes(nodes: Iterable[fx.Node]) -> int:
    """Return the bytes of the tensors `nodes` compute, views not counted; symbolic sizes by their hints."""
    seen: set[Any] = set()
    num_bytes = 0
    for node in nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and storage_of(node) not in seen:
            seen.add(storage_of(node))
            num_bytes += num_bytes_of(value)
    return num_bytes


def num_bytes_of(value: torch.Tensor) -> int:
    """Return the bytes of one tensor's items, symbolic sizes by their hints."""
    count = 1
    for size in value.shape:
        count *= hint_of(size)
    return count * value.element_size()


def hint_of(size: Any) -> int:
    """Return a size as a number: the one seen at capture where it is symbolic, 8 where none was seen."""
    if isinstance(size, int):
        return size
    hint: Any = size.node.hint
    return 8 if hint is None else int(hint)


def traffic_of(nodes: Iterable[fx.Node]) -> int:
    """Return the bytes that `nodes` read and write when each runs alone; views move nothing."""
    num_bytes = 0
    for node in nodes:
        sources = [source for source in node.all_input_nodes if is_tensor(source)]
        if all(storage_of(source) != storage_of(node) for source in sources):
            num_bytes += sum(
                num_bytes_of(item.meta["example_value"]) for item in (*sources, node) if is_tensor(item)
            )
    return num_bytes
