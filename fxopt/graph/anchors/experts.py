"""Mixtures of experts in a stock graph: sums of rows that were multiplied by matrices chosen from a stack."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxopt.graph.anchors.stock import MAX_DEPTH, MOVING, ROUNDING, is_projection, stock_name, tensors_read

STACK_RANK = 3
BETWEEN = MOVING | ROUNDING | {"mul", "add"}


def experts_kind(node: fx.Node) -> str:
    """Return "experts" if `node` sums, over one of three dims, products with matrices that a stack holds, else "".

    The rows were put in order, or each has its own copy of a matrix, or all were multiplied by all. The sum may be a
    product with the weights.
    """
    operands = tensors_read(node)
    if (
        stock_name(node) not in ("sum", "matmul")
        or not operands
        or _rank(operands[0]) != STACK_RANK
        or _rank(node) != 2
    ):
        return ""
    stacks = _find_stacks(operands[0])
    first = operands[0].meta["example_value"].shape[0]
    found = any(is_chosen or _is_equal(stack.shape[0], first) for stack, is_chosen in stacks)
    return "experts" if found else ""


def _is_equal(a: object, b: object) -> bool:
    """Return whether two sizes are one fixed number."""
    return isinstance(a, int) and isinstance(b, int) and a == b


def _find_stacks(node: fx.Node) -> list[tuple[Tensor, bool]]:
    """Return the stacks whose matrices the nearest products before `node` multiply by, and whether rows choose them."""
    found: list[tuple[Tensor, bool]] = []
    front, seen = [node], {node}
    for _ in range(MAX_DEPTH):
        following: list[fx.Node] = []
        for item in front:
            if is_projection(item):
                found += [stack for operand in tensors_read(item) if (stack := _stack_of(item, operand))]
            elif stock_name(item) in BETWEEN:
                following += [source for source in tensors_read(item) if source not in seen]
        seen.update(following)
        front = following
    return found


def _stack_of(product: fx.Node, operand: fx.Node) -> tuple[Tensor, bool] | None:
    """Return the stack of given matrices that `operand` of a product is or was picked from, and whether it was."""
    is_chosen = stock_name(product) != "matmul"
    for _ in range(MAX_DEPTH):
        value = operand.meta["example_value"]
        if operand.op in ("placeholder", "get_attr"):
            is_stack = value.dim() == STACK_RANK and value.is_floating_point()
            return (value, is_chosen) if is_stack else None
        sources = tensors_read(operand)
        if stock_name(operand) not in MOVING | ROUNDING or not sources:
            return None
        is_chosen = is_chosen or any(_is_index(source) for source in sources[1:])
        operand = sources[0]
    return None


def _is_index(node: fx.Node) -> bool:
    return node.meta["example_value"].dtype in (torch.int64, torch.int32)


def _rank(node: fx.Node) -> int:
    value = node.meta.get("example_value")
    return value.dim() if isinstance(value, Tensor) else -1
