"""Grouped products in their canonical form: rows in groups, each group multiplied by a matrix of its own.

torch has an op for it, by one name in public and another in private; transformers has one of its own for dtypes with
which torch's does not compile. All mean `vocabulary.grouped_mm`.
"""

from __future__ import annotations

from typing import Any

import torch

from fxopt.graph.edit import Editor
from fxopt.graph.names import op_name
from fxopt.graph.quantized import arguments_of, op_of
from fxopt.graph.torch_private import GROUPED_PRODUCTS, OpOverloadPacket, registered_name
from fxopt.graph.view import is_tensor
from fxopt.graph.vocabulary import LOOP_OVER_GROUPS, grouped_mm


def name_grouped_products(editor: Editor) -> None:
    """Let each product of rows in groups be the canonical one, in place, where that keeps its bits."""
    for node in editor.graph.nodes:
        found = _operands_of(node)
        if found is None or not all(map(is_tensor, found)):
            continue
        x, w, _ = (item.meta["example_value"] for item in found)
        if x.dim() == 2 and w.dim() == 3:
            node.op, node.target = "call_function", grouped_mm
            node.args, node.kwargs = found, {}


def _operands_of(node: Any) -> tuple[Any, Any, Any] | None:
    """Return rows, matrices and ends of a product that the canonical op computes by the very same op."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return None
    is_half = value.dtype == torch.bfloat16
    if op_name(node) in GROUPED_PRODUCTS:
        named = dict(zip(("input", "mat2"), node.args, strict=False)) | dict(node.kwargs)
        named = {name.removeprefix("mat_"): item for name, item in named.items()}
        x, w = named.pop("input", named.pop("self", None)), named.pop("mat2", None)
        ends = named.pop("offs", None)
        rest = [item for item in named.values() if item is not None]
        return (x, w, ends) if is_half and not rest and len(node.args) <= 2 else None
    if LOOP_OVER_GROUPS not in (op_of(node), _packet_name(node)):
        return None
    named = arguments_of(node) if op_of(node) else _by_position(node)
    return None if is_half else (named.get("input"), named.get("weight"), named.get("offs"))


def _packet_name(node: Any) -> str:
    return registered_name(node.target) if isinstance(node.target, OpOverloadPacket) else ""


def _by_position(node: Any) -> dict[str, Any]:
    return dict(zip(("input", "weight", "offs"), node.args, strict=False)) | dict(node.kwargs)
