"""Norms in a stock graph: a reciprocal root of a mean of squares, in any spelling.

Over another dim than the last one it is a norm only where a weight scales the result: without one, data are scaled so.
A length that rows are divided by is in `lengths`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from fxopt.graph.anchors.lengths import is_norm_by_length
from fxopt.graph.anchors.stock import (
    MAX_CHAIN,
    MAX_DEPTH,
    RESHAPING,
    ROUNDING,
    SCALING,
    are_equal,
    dims_reduced,
    dividend_and_divisor,
    is_given,
    is_scalar,
    is_weight,
    number_of,
    stock_name,
    tensors_read,
    unrounded,
    users_through,
)


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
    return "rms_norm" if is_scaled or is_norm_by_length(node) else ""


def _is_euclidean(node: fx.Node) -> bool:
    """Return whether a norm, or what divides by one, is the root of a sum of squares."""
    order = node.kwargs.get("p", node.kwargs.get("ord", node.args[1] if len(node.args) > 1 else 2))
    return order in (None, 2, "fro")


def _exponent(node: fx.Node) -> float | None:
    return number_of(node.args[1] if len(node.args) > 1 else node.kwargs.get("exponent"))


def _is_divisor(node: fx.Node) -> bool:
    """Return whether something is divided by `node`, or its reciprocal taken."""
    for user in users_through(node, ROUNDING | {"add"}):
        name = stock_name(user)
        if name == "reciprocal" or (name == "pow" and _exponent(user) == -1):
            return True
        if _leads_to(dividend_and_divisor(user)[1], node):
            return True
    return False


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
        if _is_sum_of_products(node):
            return is_scaled and operands[0] is operands[1]
        large = [item for item in operands if not is_scalar(item)]
        if (name not in SCALING | ROUNDING and not _adds_dims(node)) or len(large) != 1:
            return False
        is_scaled = is_scaled or name in ("mul", "div")
        node = large[0]
    return False


def _adds_dims(node: fx.Node) -> bool:
    """Return whether `node` is what it reads with dims of one: a mean without `keepdim` is given its last one back."""
    operands = tensors_read(node)
    if stock_name(node) not in RESHAPING | {"getitem"} or not operands:
        return False
    shapes = [item.meta["example_value"].shape for item in (node, operands[0])]
    after, before = ([size for size in shape if type(size) is not int or size != 1] for shape in shapes)
    return (
        len(shapes[0]) > len(shapes[1]) and len(after) == len(before) and all(map(are_equal, after, before))
    )


def _is_sum_of_products(node: fx.Node) -> bool:
    """Return whether `node` is an einsum that multiplies two tensors of one form and sums over their last dim."""
    if (
        getattr(node.target, "__name__", "") != "einsum"
        or len(node.args) != 3
        or len(tensors_read(node)) != 2
    ):
        return False
    read, _, left = str(node.args[0]).replace(" ", "").partition("->")
    first, _, second = read.partition(",")
    return first == second and left == first[:-1]


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
        if any(is_weight(item) for item in others):
            return True
    return False


def _divides_centred(node: fx.Node) -> bool:
    """Return whether a value less its mean is divided by `node`, plus an epsilon."""
    for user in users_through(node, ROUNDING | {"add"}):
        dividend, _ = dividend_and_divisor(user)
        if isinstance(dividend, fx.Node) and dividend is not node:
            return _is_centred(dividend)
    return False


def _is_centred(node: fx.Node) -> bool:
    """Return whether `node` is a value less its mean, times a weight perhaps."""
    for _ in range(MAX_CHAIN):
        operands = tensors_read(node)
        if stock_name(node) == "sub" and len(operands) == 2:
            return stock_name(unrounded(operands[1])) == "mean"
        inner = [item for item in operands if not is_given(item)]
        if stock_name(node) not in ROUNDING | {"mul"} or len(inner) != 1:
            return False
        node = inner[0]
    return False


def _is_scaled_norm(node: fx.Node) -> bool:
    """Return whether `node` is a norm by whose multiple (a root mean square) something is divided."""
    if not dims_reduced(node) or not isinstance(node.meta.get("example_value"), Tensor):
        return False
    for user in users_through(node, SCALING | ROUNDING):
        _, divisor = dividend_and_divisor(user)
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
