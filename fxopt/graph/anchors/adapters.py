"""Adapted linear layers and four-bit products in a stock graph."""

from __future__ import annotations

from torch import Tensor, fx

from fxopt.graph.anchors.stock import MAX_DEPTH, ROUNDING, is_projection, is_scalar, stock_name, tensors_read

FOUR_BITS = ("gemm_4bit", "gemv_4bit", "dequantize_4bit")
THROUGH = ROUNDING | {"mul", "div", "getitem"}


def adapter_kind(node: fx.Node) -> str:
    """Return "lora_linear" if `node` adds a product of low rank to a projection; of several such sums the first."""
    if stock_name(node) not in ("add", "sub"):
        return ""
    operands = tensors_read(node)
    if len(operands) != 2:
        return ""
    for part, base in (operands, operands[::-1]):
        if _is_low_rank(_source_of(part)) and _is_whole_projection(_source_of(base)):
            return "lora_linear"
    return ""


def four_bit_kind(node: fx.Node) -> str:
    """Return "dequantize_4bit" if `node` multiplies by a weight in four bits, by an op of its own or a function."""
    if _calls_four_bits(node):
        return "dequantize_4bit"
    if stock_name(node) != "autograd_function_apply" or not node.args:
        return ""
    body = getattr(node.graph.owning_module, str(getattr(node.args[0], "target", "")), None)
    if isinstance(body, fx.GraphModule) and any(map(_calls_four_bits, body.graph.nodes)):
        return "dequantize_4bit"
    return ""


def _calls_four_bits(node: fx.Node) -> bool:
    name = str(getattr(node.target, "_name", "")) if node.op == "call_function" else ""
    return any(name.partition("::")[2].startswith(op) for op in FOUR_BITS)


def _source_of(node: fx.Node) -> fx.Node:
    """Return the value that `node` is, through casts, copies, factors and the choice of an output."""
    for _ in range(MAX_DEPTH):
        if is_projection(node) or stock_name(node) not in THROUGH:
            return node
        operands = [item for item in tensors_read(node) if not is_scalar(item)] or [
            item for item in node.all_input_nodes if stock_name(item) == "autograd_function_apply"
        ]
        if len(operands) != 1:
            return node
        node = operands[0]
    return node


def _is_low_rank(node: fx.Node) -> bool:
    """Return whether `node` projects a projection that is narrower than its own input and than `node`."""
    if not is_projection(node):
        return False
    operands = tensors_read(node)
    inner = _source_of(operands[0]) if operands else node
    if inner is node or not is_projection(inner) or not tensors_read(inner):
        return False
    first = tensors_read(inner)[0]
    widths = [width for item in (first, inner, node) if (width := _width_of(item)) is not None]
    return len(widths) == 3 and widths[1] < min(widths[0], widths[2])


def _is_whole_projection(node: fx.Node) -> bool:
    return is_projection(node) and not _is_low_rank(node)


def _width_of(node: fx.Node) -> int | None:
    value = node.meta.get("example_value")
    width = value.shape[-1] if isinstance(value, Tensor) and value.dim() else None
    return width if isinstance(width, int) else None
