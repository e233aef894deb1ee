"""Losses in a stock graph: a cross entropy over class logits, and whether these come from one linear layer.

Written out, it is known by the log-probabilities of one class per row: picked out of a log-softmax, or the difference
of a logit picked and the logsumexp of its row, either less the other. With a value for each class, it is torch's
`kl_div` of a log-softmax, or a log-softmax weighed and summed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from fxopt.graph.anchors.soft_labels import labels_of
from fxopt.graph.anchors.stock import (
    LOSSES,
    MAX_DEPTH,
    MOVING,
    POINTWISE,
    ROUNDING,
    is_scalar,
    stock_name,
    tensors_read,
)

BETWEEN = frozenset({*POINTWISE, *MOVING, "cat", "log_softmax", "where"})
"""Ops that may stand between a head's product and its loss."""


def loss_kind(node: fx.Node) -> str:
    """Return "linear_cross_entropy" or "cross_entropy" if `node` is such a loss, else "".

    The former is of logits that one product alone leads to, item by item. What else is done to them there, a bias added
    after it say, keeps the two from being one op: the report has to tell it.
    """
    logits = _logits_of(node)
    if logits is None:
        return ""
    return "linear_cross_entropy" if len(_products_under(logits)) == 1 else "cross_entropy"


def _products_under(node: fx.Node) -> set[fx.Node]:
    """Return the products whose items, one by one, `node` is computed from."""
    front, seen = [node], {node}
    found: set[fx.Node] = set()
    while front:
        item = front.pop()
        if stock_name(item) in ("linear", "matmul"):
            found.add(item)
        elif stock_name(item) in BETWEEN:
            front += [read for read in tensors_read(item) if read not in seen and not is_scalar(read)]
            seen.update(front)
    return found


def loss_form(node: fx.Node) -> str:
    """Return how a loss is spelt whose op does not tell, "" of others."""
    labels = labels_of(node)
    return f"log_softmax times {labels}" if labels else ""


def _logits_of(node: fx.Node) -> fx.Node | None:
    """Return what the loss `node` is read from, None if it is none."""
    operands = tensors_read(node)
    if stock_name(node) in LOSSES and operands:
        return operands[0]
    if labels_of(node):
        return operands[0]
    if stock_name(node) == "kl_div" and operands:
        source = _unmoved(operands[0])
        return tensors_read(source)[0] if stock_name(source) == "log_softmax" else None
    if stock_name(node) == "sub" and len(operands) == 2:
        first, second = (_unmoved(item, but=_picks_one) for item in operands)
        total, picked = (second, first) if _picks_one(first) else (first, second)
        if stock_name(total) == "logsumexp" and _picks_one(picked):
            logits = _unmoved(tensors_read(total)[0])
            return logits if _unmoved(tensors_read(picked)[0]) is logits else None
    if _picks_one(node):
        source = _unmoved(operands[0])
        return tensors_read(source)[0] if stock_name(source) == "log_softmax" else None
    return None


def _picks_one(node: fx.Node) -> bool:
    """Return whether `node` picks one item out of each row of the last dim, by an index for every row."""
    operands = tensors_read(node)
    if stock_name(node) == "getitem":
        index = node.args[1]
        picked = [item for item in index if isinstance(item, fx.Node)] if isinstance(index, tuple) else []
        return len(picked) >= 2 and len(picked) == _rank(operands[0]) == len(tensors_read(node)) - 1
    if stock_name(node) not in ("gather", "take_along_dim") or len(operands) != 2:
        return False
    rows, index = (item.meta["example_value"] for item in operands)
    dims = {item for item in (*node.args, *node.kwargs.values()) if isinstance(item, int)}
    return bool(dims & {-1, rows.dim() - 1}) and index.dtype == torch.int64 and index.shape[-1] == 1


def _rank(node: fx.Node) -> int:
    return node.meta["example_value"].dim()


def _unmoved(node: fx.Node, but: Callable[[fx.Node], bool] = lambda node: False) -> fx.Node:
    """Return what `node` is before it was cast and moved, as far as the first for which `but` holds."""
    for _ in range(MAX_DEPTH):
        operands = tensors_read(node)
        if stock_name(node) not in ROUNDING | MOVING or not operands or but(node):
            return node
        node = operands[0]
    return node
