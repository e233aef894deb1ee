"""A pass over the joint graph: where backward reads a small part of a larger value, the part is saved as a copy.

What is saved as a view keeps all of its memory alive: the values of an attention that come out of one projection with
its queries and keys, say, of which backward reads only what was turned. The copy costs one pass over the part.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fxopt.graph.storage import UNKNOWN, key_of

SHARE = 2
"""A whole of which backward reads no more than one part in this many is not saved for its parts."""


def copy_saved_parts(graph: fx.Graph, in_backward: set[fx.Node]) -> int:
    """Let backward read copies of such parts, and return how many are copied."""
    kept = [node for node in graph.nodes if node.op == "placeholder"]
    kept += graph.output_node().all_input_nodes  # what forward hands on lives anyway
    values = [node.meta.get("val") for node in kept]
    kept_keys = {UNKNOWN, *(key_of(value) for value in values if isinstance(value, torch.Tensor))}
    parts: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node in in_backward or not isinstance(value, torch.Tensor) or in_backward.isdisjoint(node.users):
            continue
        if key_of(value) not in kept_keys:
            parts.setdefault(key_of(value), []).append(node)
    copied = [node for nodes in parts.values() if _are_few(nodes) for node in nodes]
    for node in copied:
        _copy(graph, node, in_backward)
    return len(copied)


def _are_few(nodes: list[fx.Node]) -> bool:
    """Return whether `nodes`, all in one storage, are a small part of it; equal views count once."""
    values: list[torch.Tensor] = [node.meta["val"] for node in nodes]
    forms = [(value.storage_offset(), *value.shape, *value.stride()) for value in values]
    whole = values[0].untyped_storage().nbytes()
    if not all(isinstance(number, int) for number in (whole, *itertools.chain.from_iterable(forms))):
        return False  # of sizes that change it is not known
    distinct = dict(zip(forms, values, strict=True))
    read = sum(math.prod(value.shape) * value.element_size() for value in distinct.values())
    return SHARE * read <= whole


def _copy(graph: fx.Graph, node: fx.Node, in_backward: set[fx.Node]) -> None:
    with graph.inserting_after(node):
        copy = graph.call_function(torch.ops.aten.clone.default, (node,))
    copy.meta = {key: value for key, value in node.meta.items() if key in ("stack_trace", "nn_module_stack")}
    copy.meta["val"] = node.meta["val"].clone()
    copy.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    for user in [user for user in node.users if user in in_backward]:
        user.replace_input_with(node, copy)
