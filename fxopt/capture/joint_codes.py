"""A pass over the joint graph: products with adapters read four-bit weights as they are stored.

It knows the ops by their arguments: a decoding has `packed`, `shape`, `blocksize`, `quant_type` and `dtype`, and an
op that decodes within itself takes `weights`, `codes` and `codings` and multiplies `xs` by them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.graph.torch_private import OpOverload, schema_of

NAMESPACE = "fxopt"
DECODING = ("packed", "shape", "blocksize", "quant_type", "dtype")
READER = ("xs", "weights", "codes", "codings", "widths")


def read_codes(graph: fx.Graph) -> int:
    """Give ops that can decode within themselves the codes of their weights; return how many weights they decode.

    A decoded weight is then nobody's value: memory for it lives as long as one product, and the op may lay it out
    as that product wants it.
    """
    decoded: set[fx.Node] = set()
    count = 0
    for node in list(graph.nodes):
        names = argument_names(node)
        if not set(READER) <= set(names):
            continue
        given = dict(zip(names, node.args, strict=True))
        for place, weight in enumerate(given["weights"]):
            parts = _decoding_of(weight, given["xs"][0])
            if parts is None:
                continue
            packed, codes, coding = parts
            given["weights"] = _put(given["weights"], place, [packed])
            given["codes"] = _put(given["codes"], place * len(codes), codes)
            given["codings"] = _put(given["codings"], place, [coding])
            decoded.add(weight)
            count += 1
        node.args = tuple(given.values())
    for node in decoded:
        if not node.users:
            graph.erase_node(node)
    return count


def argument_names(node: fx.Node) -> list[str]:
    """Return the names of the arguments of an op of ours, [] of any other node."""
    target: Any = node.target
    return [argument.name for argument in schema_of(target).arguments] if is_ours(node) else []


def is_ours(node: fx.Node) -> bool:
    """Return whether `node` calls an op of fxopt's."""
    return isinstance(node.target, OpOverload) and node.target.namespace == NAMESPACE


def are_alike(*nodes: fx.Node) -> bool:
    """Return whether all values have one shape and dtype: nothing is broadcast or promoted."""
    first, *others = (node.meta.get("val") for node in nodes)
    return isinstance(first, torch.Tensor) and all(
        isinstance(value, torch.Tensor) and value.shape == first.shape and value.dtype == first.dtype
        for value in others
    )


def _decoding_of(weight: Any, x: fx.Node) -> tuple[fx.Node, list[Any], str] | None:
    """Return packed codes, what belongs to them and how they are coded, where `weight` is decoded in the dtype of x."""
    names = argument_names(weight)
    if not set(DECODING) <= set(names):
        return None
    given: dict[str, Any] = dict(zip(names, weight.args, strict=True))
    value = x.meta["val"]
    if given["dtype"] != value.dtype or len(given["shape"]) != 2 or given["shape"][1] != value.shape[-1]:
        return None
    codes = [value for name, value in given.items() if name not in DECODING]
    return given["packed"], codes, f"{given['quant_type']}:{given['blocksize']}"


def _put(items: list[Any], start: int, new: list[Any]) -> list[Any]:
    return [*items[:start], *new, *items[start + len(new) :]]
