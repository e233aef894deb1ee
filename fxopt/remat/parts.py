"""A joint graph in which backward is handed some rows of a value by forward, and computes only the others again.

A block that computes a value again may still have time on the bus, though not for all of that value: some of its rows
can wait on the host, and the product that computes it again is shorter by them. An op that can do so declares what
copies the rows (`Declared.known`), and takes them as an argument of that name, all dimensions but the last as one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.remat.cost import Declarations
from fxopt.remat.joint import COPIED_META, PART, REPLAYS, Joint
from fxopt.report.plan import SHARES

KNOWN, ROWS = "known", "rows"
aten = torch.ops.aten


def find_divisible(joint: Joint, declared: Declarations) -> dict[str, int]:
    """Return the labels of the values of which some rows may be kept, and the place of what computes each again."""
    values = joint.dag.values
    return {
        values[value.stands_for].label: place
        for place, value in enumerate(values)
        if value.stands_for is not None
        and _copies_of(joint.forward[place], declared) is not None
        and num_rows_of(joint.forward[value.stands_for]) >= SHARES
    }


def _copies_of(node: fx.Node, declared: Declarations) -> Any:
    known = declared.get(node.target)
    return None if known is None else known.known


def num_rows_of(node: fx.Node) -> int:
    """Return the rows of the value of `node`, 0 where they are not known or not side by side."""
    value = node.meta.get("val")
    if (
        not isinstance(value, Tensor)
        or value.ndim < 2
        or any(isinstance(n, torch.SymInt) for n in value.shape)
    ):
        return 0
    return math.prod(value.shape[:-1]) if value.is_contiguous() else 0


def keep_rows(graph: fx.Graph, replay: fx.Node, share: int, declared: Declarations) -> None:
    """Let `replay` be handed so many sixteenths of the rows of the value that it computes again.

    That value lies densely in memory, [*, N] of T rows; [T * share // 16, N] of it are copied. `replay` says what it
    computes again (`REPLAYS`), and its op declares what copies the rows.
    """
    name = replay.meta[REPLAYS]
    source = next(node for node in graph.nodes if node.name == name)
    value: Tensor = source.meta["val"]
    count = math.prod(value.shape[:-1])
    with graph.inserting_after(source):
        flat = graph.call_function(aten.view.default, (source, [count, value.shape[-1]]))
    with graph.inserting_after(flat):
        some = graph.call_function(aten.slice.Tensor, (flat, 0, 0, count * share // SHARES))
    with graph.inserting_after(some):
        kept = graph.call_function(_copies_of(replay, declared), (some,))
    for node, part in ((flat, "flat"), (some, "some"), (kept, ROWS)):
        node.meta = {key: source.meta[key] for key in COPIED_META if key in source.meta}
        target: Any = node.target
        node.meta["val"] = target(*fx.map_arg(node.args, lambda item: item.meta["val"]))
        node.meta[PART] = (name, part)
    replay.kwargs = {**replay.kwargs, KNOWN: kept}


def label_of_rows(label: str) -> str:
    """Return the label of the rows that are kept of the value with `label`."""
    return f"{label}/{ROWS}"
