"""Norms in a stock graph by a length: rows divided by their Euclidean length, then scaled.

Rows of length one are a norm where they are multiplied by the root of their size, or by a weight for each item.
"""

from __future__ import annotations

import math

from torch import fx, nn

from fxopt.graph.anchors.stock import (
    MAX_CHAIN,
    ROUNDING,
    dims_reduced,
    dividend_and_divisor,
    is_weight,
    number_of,
    stock_name,
    tensors_read,
    unrounded,
    users_through,
)


def is_norm_by_length(node: fx.Node) -> bool:
    """Return whether `node` is the length of rows, or divides them by it, and what has length one then is scaled."""
    return _reduces_norm_last(node) and (_is_of_length_root(node) or _weighs_unit_rows(node))


def _reduces_norm_last(node: fx.Node) -> bool:
    return dims_reduced(node) in ((-1,), (tensors_read(node)[0].meta["example_value"].dim() - 1,))


def _is_of_length_root(node: fx.Node) -> bool:
    """Return whether rows divided by their norm, which `node` is or does, are multiplied by the root of their size."""
    size = tensors_read(node)[0].meta["example_value"].shape[-1]
    readers = [
        user for item in _unit_rows(node) for user in (*item.users, *users_through(item, ROUNDING | {"mul"}))
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
        found += [user for user in users if dividend_and_divisor(user)[1] in front]
        front = [user for user in users if stock_name(user) in ROUNDING | {"expand", "expand_as"}]
    return found


def _weighs_unit_rows(node: fx.Node) -> bool:
    """Return whether rows divided by their norm, which `node` is or does, are multiplied by a weight for each item.

    They are then those of an rms_norm whose weight is less by the root of their size. Without a weight, or with a
    number alone, what is asked for is the angle between rows, which no norm's weight could stand for. Rows of a weight
    (a weight norm) are no activations.
    """
    rows = unrounded(tensors_read(node)[0])
    if isinstance(rows.meta["example_value"], nn.Parameter):
        return False
    for item in _unit_rows(node):
        dividend, _ = dividend_and_divisor(item)
        if item is not node and not (isinstance(dividend, fx.Node) and unrounded(dividend) is rows):
            continue
        products = [user for user in users_through(item, ROUNDING) if stock_name(user) == "mul"]
        others = [other for user in products for other in tensors_read(user) if other is not item]
        if any(is_weight(other) and _is_of_size(other, rows) for other in others):
            return True
    return False


def _is_of_size(weight: fx.Node, rows: fx.Node) -> bool:
    sizes = (weight.meta["example_value"].shape[-1], rows.meta["example_value"].shape[-1])
    return all(isinstance(size, int) for size in sizes) and sizes[0] == sizes[1]
