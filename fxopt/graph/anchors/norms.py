"""Norms in a stock graph: a reciprocal root of a mean of squares, in any spelling.

Over another dim than the last one it is a norm only where a weight scales the result: without one, data are scaled so.
Rows of length one are a norm where they are multiplied by the root of their size, or by a weight for each item.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from fxopt.graph.anchors.stock import (
    MAX_DEPTH,
    ROUNDING,
    SCALING,
    dims_reduced,
    is_given,
    is_scalar,
    number_of,
    stock_name,
    tensors_read,
)

MAX_CHAIN = 5


def norm_kind(node: fx.Node) -> str:
    """Return "rms_norm" if `node` is the root of a norm's mean of squares, or a whole norm, else ""."""
    name = stock_name(node)
    if name == "rms_norm":
        return "rms_norm"
    is_root = (
        name == "rsqrt"
        or (name == "pow" and _exponent(node) == -0.5)
        or (name == "sqrt" and _is_divisor(node))
        or (name == "pow" and _exponent(node) == 0.5 and _is_divisor(node))
    )
    if is_root and tensors_read(node):
        squares = tensors_read(node)[0]
        if _is_mean_of_squares(squares, _reduces_last):
            return "rms_norm"
        if _is_mean_of_squares(squares, _reduces_one) and _leads_to_weight(node):
            return "rms_norm"
    if name == "std":
        return "rms_norm" if _reduces_last(node) and _is_divisor(node) and _divides_centred(node) else ""
    if name not in ("norm", "normalize") or not tensors_read(node) or not _is_euclidean(node):
        return ""
    is_scaled = name == "norm" and _is_scaled_norm(node)
    is_norm = is_scaled or (
        _reduces_norm_last(node) and (_is_of_length_root(node) or _weighs_unit_rows(node))
    )
    return "rms_norm" if is_norm else ""


def _is_euclidean(node: fx.Node) -> bool:
    """Return whether a norm, or what divides by one, is the root of a sum of squares."""
    order = node.kwargs.get("p", node.kwargs.get("ord", node.args[1] if len(node.args) > 1 else 2))
    return order in (None, 2, "fro")


def _dividend_and_divisor(node: fx.Node) -> tuple[Any, Any]:
    """Return what `node` divides and by what, None twice where it is no division."""
    if stock_name(node) != "div":
        return None, None
    dividend = node.args[0] if node.args else node.kwargs.get("input")
    return dividend, node.args[1] if len(node.args) > 1 else node.kwargs.get("other")


def _exponent(node: fx.Node) -> float | None:
    return number_of(node.args[1] if len(node.args) > 1 else node.kwargs.get("exponent"))


def _is_divisor(node: fx.Node) -> bool:
    """Return whether something is divided by `node`, or its reciprocal taken."""
    for user in _users_through(node, ROUNDING | {"add"}):
        name = stock_name(user)
        if name == "reciprocal" or (name == "pow" and _exponent(user) == -1):
            return True
        if _leads_to(_dividend_and_divisor(user)[1], node):
            return True
    return False


def _users_through(node: fx.Node, names: frozenset[str]) -> list[fx.Node]:
    """Return the users of `node`, and those behind a few of `names` that read nothing else."""
    found: list[fx.Node] = []
    front = [node]
    for _ in range(MAX_CHAIN):
        users = [user for item in front for user in item.users]
        found.extend(users)
        front = [user for user in users if stock_name(user) in names and len(tensors_read(user)) == 1]
    return found


def _leads_to(item: Any, node: fx.Node) -> bool:
    for _ in range(MAX_DEPTH):
        if item is node or not isinstance(item, fx.Node):
            return item is node
        operands = tensors_read(item)
        if len(operands) != 1 or stock_name(item) not in SCALING | ROUNDING:
            return False
        item = operands[0]
    return False


def _is_mean_of_squares(node: fx.Node, reduces: Callable[[fx.Node], bool]) -> bool:
    """Return whether `node` is a mean of squares over dims that `reduces` holds for, plus an epsilon, in any dtype."""
    is_scaled = False
    for _ in range(MAX_DEPTH):
        name, operands = stock_name(node), tensors_read(node)
        if name in ("mean", "var", "sum"):
            if not reduces(node) or not operands:
                return False
            if name == "var":
                return True
            return (name == "mean" or is_scaled) and _is_square(operands[0])
        if name in ("pow", "square") and operands and stock_name(operands[0]) == "norm":
            is_square = name == "square" or _exponent(node) == 2
            return is_scaled and is_square and _is_euclidean(operands[0]) and reduces(operands[0])
        large = [item for item in operands if not is_scalar(item)]
        if name not in SCALING | ROUNDING or len(large) != 1:
            return False
        is_scaled = is_scaled or name in ("mul", "div")
        node = large[0]
    return False


def _is_square(node: fx.Node) -> bool:
    for _ in range(MAX_DEPTH):
        name, operands = stock_name(node), tensors_read(node)
        if name == "square" or (name == "pow" and _exponent(node) == 2):
            return True
        if name == "mul" and len(operands) == 2:
            return operands[0] is operands[1]
        if name not in ROUNDING or not operands:
            return False
        node = operands[0]
    return False


def _reduces_last(node: fx.Node) -> bool:
    operands = tensors_read(node)
    rank = operands[0].meta["example_value"].dim() if operands else 0
    return any(item in (-1, rank - 1) for item in dims_reduced(node))


def _reduces_one(node: fx.Node) -> bool:
    return len(dims_reduced(node)) == 1


def _leads_to_weight(node: fx.Node) -> bool:
    """Return whether what `node` scales is multiplied by a weight."""
    front = [node]
    for _ in range(MAX_CHAIN):
        users = list(dict.fromkeys(user for item in front for user in item.users))
        front = [user for user in users if stock_name(user) in ROUNDING | {"mul", "div", "reciprocal"}]
        others = [item for user in front for item in tensors_read(user) if stock_name(user) == "mul"]
        if any(_is_weight(item) for item in others):
            return True
    return False


def _is_weight(node: fx.Node) -> bool:
    """Return whether `node` is a parameter, trained or frozen, in any dtype."""
    weight = _unrounded(node)
    value = weight.meta["example_value"]
    return isinstance(value, nn.Parameter) and not is_scalar(weight) and value.dim() <= 2


def _unrounded(node: fx.Node) -> fx.Node:
    """Return what `node` is before casts."""
    while stock_name(node) in ROUNDING and tensors_read(node):
        node = tensors_read(node)[0]
    return node


def _divides_centred(node: fx.Node) -> bool:
    """Return whether a value less its mean is divided by `node`, plus an epsilon."""
    for user in _users_through(node, ROUNDING | {"add"}):
        dividend, _ = _dividend_and_divisor(user)
        if isinstance(dividend, fx.Node) and dividend is not node:
            return _is_centred(dividend)
    return False


def _is_centred(node: fx.Node) -> bool:
    """Return whether `node` is a value less its mean, times a weight perhaps."""
    for _ in range(MAX_CHAIN):
        operands = tensors_read(node)
        if stock_name(node) == "sub" and len(operands) == 2:
            return stock_name(_unrounded(operands[1])) == "mean"
        inner = [item for item in operands if not is_given(item)]
        if stock_name(node) not in ROUNDING | {"mul"} or len(inner) != 1:
            return False
        node = inner[0]
    return False


def _reduces_norm_last(node: fx.Node) -> bool:
    return dims_reduced(node) in ((-1,), (tensors_read(node)[0].meta["example_value"].dim() - 1,))


def _is_of_length_root(node: fx.Node) -> bool:
    """Return whether rows divided by their norm, which `node` is or does, are multiplied by the root of their size."""
    size = tensors_read(node)[0].meta["example_value"].shape[-1]
    readers = [
        user for item in _unit_rows(node) for user in (*item.users, *_users_through(item, ROUNDING | {"mul"}))
    ]
    weighted = [user for item in readers if stock_name(item) == "mul" for user in item.users]
    products = [user for user in (*readers, *weighted) if stock_name(user) == "mul"]
    numbers = [number_of(item) for user in products for item in user.args]
    return isinstance(size, int) and any(
        number is not None and math.isclose(number, math.sqrt(size), rel_tol=1e-4) for number in numbers
    )


def _unit_rows(node: fx.Node) -> list[fx.Node]:
    """Return what has rows divided by their norm, which `node` is or does."""
    front, found = [node], [node] if stock_name(node) == "normalize" else []
    for _ in range(MAX_CHAIN):
        users = [user for item in front for user in item.users]
        found += [user for user in users if _dividend_and_divisor(user)[1] in front]
        front = [user for user in users if stock_name(user) in ROUNDING | {"expand", "expand_as"}]
    return found


def _weighs_unit_rows(node: fx.Node) -> bool:
    """Return whether rows divided by their norm, which `node` is or does, are multiplied by a weight for each item.

    They are then those of an rms_norm whose weight is less by the root of their size. That is so of queries and keys
    too: what makes them a norm is the weight. Without one, or with a number alone, what is asked for is the angle
    between rows, which no norm's weight could stand for. Rows of a weight (a weight norm) are no activations.
    """
    rows = _unrounded(tensors_read(node)[0])
    if isinstance(rows.meta["example_value"], nn.Parameter):
        return False
    for item in _unit_rows(node):
        if stock_name(item) != "normalize" and _unrounded(item.all_input_nodes[0]) is not rows:
            continue
        products = [user for user in _users_through(item, ROUNDING) if stock_name(user) == "mul"]
        others = [other for user in products for other in tensors_read(user) if other is not item]
        if any(_is_weight(other) and _is_of_size(other, rows) for other in others):
            return True
    return False


def _is_of_size(weight: fx.Node, rows: fx.Node) -> bool:
    sizes = (weight.meta["example_value"].shape[-1], rows.meta["example_value"].shape[-1])
    return all(isinstance(size, int) for size in sizes) and sizes[0] == sizes[1]


def _is_scaled_norm(node: fx.Node) -> bool:
    """Return whether `node` is a norm by whose multiple (a root mean square) something is divided."""
    if not dims_reduced(node) or not isinstance(node.meta.get("example_value"), Tensor):
        return False
    for user in _users_through(node, SCALING | ROUNDING):
        _, divisor = _dividend_and_divisor(user)
        if divisor is not None and any(stock_name(each) == "clamp" for each in user.users):
            return False  # a factor with a bound clips long values and leaves short ones alone
        if divisor is not node and _leads_to(divisor, node):
            return True
        if divisor is node and _is_rescaled(user):
            return True
        if stock_name(user) == "reciprocal" and node not in tensors_read(user):
            return True
    return False


def _is_rescaled(node: fx.Node) -> bool:
    return any(stock_name(user) == "mul" and len(tensors_read(user)) == 1 for user in node.users)
