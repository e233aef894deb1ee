"""Inputs of adapters that items are dropped from: of each item one bit is kept for backward.

Stock keeps what dropout left, and a mask of one byte or more an item, for every projection. Nothing is matched or
computed otherwise: torch's own dropout draws the same items in the same order.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.graph.edit import PROVENANCE, fresh_like
from fxopt.graph.purity import is_active_dropout, is_inplace
from fxopt.graph.view import find_subgraphs
from fxopt.kernels.lora_linear import lora_linear
from fxopt.kernels.lora_linear.dropped import BITS, dropout


def keep_bits_of_dropped(gm: fx.GraphModule) -> int:
    """Let dropout before an adapter keep bits, and return of how many inputs."""
    count = 0
    for _, part in find_subgraphs(gm):
        before: fx.Node | None = None
        for node in list(part.graph.nodes):
            p = _probability_of(node)
            if p is not None:
                before = _keep_bits(node, p, before)
                count += 1
    return count


def _probability_of(node: fx.Node) -> float | None:
    """Return the p of a dropout that only adapters read, None of anything else."""
    if node.target is not F.dropout or is_inplace(node) or not is_active_dropout(node):
        return None
    if not node.users or any(user.target is not lora_linear for user in node.users):
        return None
    value = node.meta.get("example_value")
    p: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    if not isinstance(p, int | float) or not isinstance(value, torch.Tensor):
        return None
    return float(p) if 0 < p < 1 and value.is_floating_point() else None


def _keep_bits(node: fx.Node, p: float, after: fx.Node | None) -> fx.Node:
    """Put the dropout that keeps bits in the place of `node` and return the node of its bits."""
    graph, value = node.graph, node.meta["example_value"]
    source = node.args[0] if node.args else node.kwargs["input"]
    left = fresh_like(value.contiguous())
    with torch.no_grad():
        packed = value.new_empty(((value.numel() + BITS - 1) // BITS,), dtype=torch.uint8)
    with graph.inserting_before(node):
        both = graph.call_function(dropout, (source, p, after))
        result, bits = (graph.call_function(operator.getitem, (both, place)) for place in (0, 1))
    for new, example in ((both, (left, packed)), (result, left), (bits, packed)):
        new.meta = {key: node.meta[key] for key in (*PROVENANCE, "origins") if key in node.meta}
        new.meta |= {"rewritten_by": lora_linear.__name__, "example_value": example}
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return bits
