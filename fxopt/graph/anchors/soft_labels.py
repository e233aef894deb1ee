"""Losses in a stock graph by a value for each class: log-probabilities times a one-hot or soft labels, summed.

Log-probabilities times probabilities of the same logits are an entropy: a bonus or a penalty, no loss.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fxopt.graph.anchors.stock import (
    MOVING,
    ROUNDING,
    SCALING,
    dims_reduced,
    stock_name,
    tensors_read,
)

LIKE = ("new_", "zeros_like", "ones_like", "full_like", "empty_like")
"""How ops begin that read of a tensor its form alone."""
ONE_HOT = frozenset({"one_hot", "scatter"})


def labels_of(node: fx.Node) -> str:
    """Return "a one-hot" or "soft labels" if the log-softmax `node` is weighed by these and summed, else "".

    Soft labels are no function of the same logits, which would be an entropy, and the log-softmax is to be trained:
    of a frozen model it is what others are compared with.
    """
    if stock_name(node) != "log_softmax":
        return ""
    own = _logits_path(node)
    for factors in _products_summed(node):
        if any(_is_one_hot(factor) for factor in factors):
            return "a one-hot"
        if node.meta["example_value"].requires_grad and not any(_reads(factor, own) for factor in factors):
            return "soft labels"
    return ""


def _products_summed(node: fx.Node) -> Iterator[list[fx.Node]]:
    """Yield what has a value for each class and is multiplied with `node`, for each sum over the classes."""
    front: list[tuple[fx.Node, list[fx.Node]]] = [(node, [])]
    seen: set[fx.Node] = set()
    while front:
        item, factors = front.pop()
        for user in item.users:
            name, others = stock_name(user), [other for other in tensors_read(user) if other is not item]
            if name in ("sum", "mean") and factors and _reduces_classes(user):
                yield factors
            is_read_first = bool(user.args) and user.args[0] is item
            if user in seen or (name in MOVING | ROUNDING and not is_read_first):
                continue
            if name in SCALING | ROUNDING or (name in MOVING and not others):
                seen.add(user)
                more = [other for other in others if name == "mul" and _has_classes(other, item)]
                front.append((user, factors + more))


def _reduces_classes(node: fx.Node) -> bool:
    dims, rank = dims_reduced(node), tensors_read(node)[0].meta["example_value"].dim()
    return not dims or bool({-1, rank - 1} & set(dims))


def _has_classes(node: fx.Node, scores: fx.Node) -> bool:
    """Return whether `node` has a value for each class of each row of `scores`, as a mask of rows has not."""
    value, expected = node.meta["example_value"], scores.meta["example_value"]
    sizes = (value.shape[-1], expected.shape[-1]) if value.dim() == expected.dim() else (1, 2)
    return value.dim() > 1 and all(isinstance(size, int) for size in sizes) and sizes[0] == sizes[1]


def _is_one_hot(node: fx.Node) -> bool:
    """Return whether `node` is a one-hot, smoothed or scaled perhaps."""
    front, seen = [node], {node}
    while front:
        item = front.pop()
        if stock_name(item) in ONE_HOT:
            return True
        if stock_name(item) in SCALING | ROUNDING | MOVING:
            front += [operand for operand in tensors_read(item) if operand not in seen]
            seen.update(front)
    return False


def _logits_path(node: fx.Node) -> set[fx.Node]:
    """Return a log-softmax and the logits it is of, through scale, casts and moves, down to what made them."""
    path = {node}
    while operands := tensors_read(node):
        node = operands[0]
        path.add(node)
        if stock_name(node) not in SCALING | ROUNDING | MOVING:
            break
    return path


def _reads(node: fx.Node, values: set[fx.Node]) -> bool:
    """Return whether `node` is computed from one of `values`."""
    front, seen = [node], {node}
    while front:
        item = front.pop()
        if item in values:
            return True
        if not stock_name(item).startswith(LIKE):
            front += [operand for operand in tensors_read(item) if operand not in seen]
            seen.update(front)
    return False
