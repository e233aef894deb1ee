"""Attention in a stock graph: torch's own, alone or with its projections, or a softmax that weighs values."""

from __future__ import annotations

from torch import fx

from fxopt.graph.anchors.stock import (
    MAX_DEPTH,
    MOVING,
    ROUNDING,
    SCALING,
    is_scalar,
    stock_name,
    tensors_read,
)

SCORES = SCALING | ROUNDING | MOVING | {"tanh", "cat", "masked_fill", "where", "pow", "max"}
WEIGHTS = SCALING | ROUNDING | MOVING
READY = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward"})
"""The second, of `nn.MultiheadAttention`, projects and attends in one call."""
LEAST_RANK = 3
"""Of what is multiplied: a product with a weight has one of two dims."""
MAX_USERS = 16


def attention_kind(node: fx.Node) -> str:
    """Return "attention" if `node` is torch's attention or the softmax of a spelled-out one, else ""."""
    name = stock_name(node)
    if name in READY:
        return "attention"
    if name != "softmax" or not tensors_read(node):
        return ""
    return "attention" if _is_of_scores(tensors_read(node)[0]) and _weighs_values(node) else ""


def _is_of_scores(node: fx.Node) -> bool:
    """Return whether `node` is a product of two computed values, scaled, capped and masked."""
    for _ in range(MAX_DEPTH):
        name, operands = stock_name(node), tensors_read(node)
        if name == "matmul":
            return _is_product_of_values(operands)
        if name not in SCORES:
            return False
        large = [item for item in operands if not is_scalar(item)]
        # The scores come first, except where a mask is added to them or chooses between them and a number.
        following = [item for item in large if _leads_to_product(item)]
        if not following:
            return False
        node = following[0]
    return False


def _leads_to_product(node: fx.Node) -> bool:
    front = [node]
    for _ in range(MAX_DEPTH):
        if any(stock_name(item) == "matmul" for item in front):
            return True
        inner = [source for item in front if stock_name(item) in SCORES for source in tensors_read(item)]
        front = list(dict.fromkeys(inner))[:MAX_USERS]
        if not front:
            return False
    return False


def _is_product_of_values(operands: list[fx.Node]) -> bool:
    values = [item.meta["example_value"] for item in operands]
    matrices = [value for value in values if value.dim() >= LEAST_RANK and value.is_floating_point()]
    return len(matrices) >= 2 and len(matrices) == len(values)


def _weighs_values(node: fx.Node) -> bool:
    """Return whether the softmax, rounded or with items dropped, is multiplied with a computed value."""
    front = [node]
    for _ in range(MAX_DEPTH):
        users = list(dict.fromkeys(user for item in front for user in item.users))[:MAX_USERS]
        if any(stock_name(user) == "matmul" and _is_product_of_values(tensors_read(user)) for user in users):
            return True
        front = [user for user in users if stock_name(user) in WEIGHTS]
        if not front:
            return False
    return False
