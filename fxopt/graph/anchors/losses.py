"""Losses in a stock graph: a cross entropy over class logits, and whether these come from one linear layer."""

from __future__ import annotations

from torch import fx

from fxopt.graph.anchors.stock import LOSSES, MAX_DEPTH, SOFTCAP, is_scalar, stock_name, tensors_read


def loss_kind(node: fx.Node) -> str:
    """Return "linear_cross_entropy" or "cross_entropy" if `node` is such a loss, else ""."""
    if stock_name(node) not in LOSSES or not tensors_read(node):
        return ""
    logits = tensors_read(node)[0]
    for _ in range(MAX_DEPTH):
        name, operands = stock_name(logits), tensors_read(logits)
        if name in ("linear", "matmul"):
            return "linear_cross_entropy"
        large = [item for item in operands if not is_scalar(item)]
        if name not in SOFTCAP or len(large) != 1:
            return "cross_entropy"
        logits = large[0]
    return "cross_entropy"
