"""Norms in a stock graph: a reciprocal root of a mean of squares, in any spelling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fxopt.graph.anchors.stock import (
    MAX_DEPTH,
    ROUNDING,
    SCALING,
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
    if is_root and tensors_read(node) and _is_mean_of_squares(tensors_read(node)[0]):
        return "rms_norm"
    return "rms_norm" if name == "norm" and _is_scaled_norm(node) else ""


def _exponent(node: fx.Node) -> float | None:
    return number_of(node.args[1] if len(node.args) > 1 else node.kwargs.get("exponent"))


def _is_divisor(node: fx.Node) -> bool:
    """Return whether something is divided by `node`, or its reciprocal taken."""
    for user in _users_through(node, ROUNDING | {"add"}):
        name = stock_name(user)
        if name == "reciprocal" or (name == "pow" and _exponent(user) == -1):
            return True
        if name == "div" and len(user.args) == 2 and _leads_to(user.args[1], node):
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


def _is_mean_of_squares(node: fx.Node) -> bool:
    """Return whether `node` is a mean of squares over the last dim, plus an epsilon, in any dtype."""
    is_scaled = False
    for _ in range(MAX_DEPTH):
        name, operands = stock_name(node), tensors_read(node)
        if name in ("mean", "var", "sum"):
            if not _reduces_last(node) or not operands:
                return False
            if name == "var":
                return True
            return (name == "mean" or is_scaled) and _is_square(operands[0])
        if name in ("pow", "square") and operands and stock_name(operands[0]) == "norm":
            is_square = name == "square" or _exponent(node) == 2
            return is_scaled and is_square and _reduces_last(operands[0])
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
    dim = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else None))
    dims = (dim,) if isinstance(dim, int) else dim
    operands = tensors_read(node)
    if not isinstance(dims, list | tuple) or not operands:
        return False
    rank = operands[0].meta["example_value"].dim()
    return any(isinstance(item, int) and item in (-1, rank - 1) for item in dims)


def _is_scaled_norm(node: fx.Node) -> bool:
    """Return whether `node` is a norm by whose multiple (a root mean square) something is divided."""
    order = node.kwargs.get("p", node.kwargs.get("ord", node.args[1] if len(node.args) > 1 else 2))
    if order not in (None, 2, 2.0, "fro") or not isinstance(node.meta.get("example_value"), Tensor):
        return False
    if "dim" not in node.kwargs and len(node.args) < 3:
        return False
    for user in _users_through(node, SCALING | ROUNDING):
        divides = stock_name(user) == "div" and len(user.args) == 2
        if divides and any(stock_name(each) == "clamp" for each in user.users):
            return False  # a factor with a bound clips long values and leaves short ones alone
        if divides and user.args[1] is not node and _leads_to(user.args[1], node):
            return True
        if divides and user.args[1] is node and _is_rescaled(user):
            return True
        if stock_name(user) == "reciprocal" and user.args[0] is not node:
            return True
    return False


def _is_rescaled(node: fx.Node) -> bool:
    return any(stock_name(user) == "mul" and len(tensors_read(user)) == 1 for user in node.users)
