"""The order of a result's dimensions in memory: stock code may `view` what a region returns, so it stays stock's.

Within a graph every view is canonical, a reshape that copies where it must; nobody can tell how values lie there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxopt.graph.storage import keys_of
from fxopt.graph.torch_private import hint_of
from fxopt.graph.view import find_subgraphs, results_of
from fxopt.graph.vocabulary import contiguous

NOTE = "orders_in_memory"
LAID_OUT = "laid_out_as_stock"
Order = tuple[int, ...]
"""A result's dimensions, the one with the largest stride first."""


def note_orders(gm: fx.GraphModule) -> None:
    """Note on the output of the stock graph `gm` how its results lie in memory."""
    (output,) = gm.graph.find_nodes(op="output")
    output.meta[NOTE] = tuple(
        find_order(result.meta.get("example_value")) if isinstance(result, fx.Node) else None
        for result in results_of(gm)
    )


def restore_orders(gm: fx.GraphModule) -> None:
    """Copy those results of `gm` that rewrites have laid out in another order than stock back into stock's.

    An order that stock's `view`s cannot tell from stock's own is enough: gaps between the rows of a result, as
    in a slice, allow fewer views than none. Results that share memory with each other are left as they are.
    """
    (output,) = gm.graph.find_nodes(op="output")
    results = list(results_of(gm))
    touched = _find_touched(gm)
    keys = [keys_of(node) if isinstance(node, fx.Node) else frozenset[int]() for node in results]
    for place, (node, order) in enumerate(zip(results, output.meta.get(NOTE, ()), strict=True)):
        if not isinstance(node, fx.Node) or order is None or node not in touched:
            continue
        shared = any(keys[place] & other for index, other in enumerate(keys) if results[index] is not node)
        if shared or (order == tuple(range(len(order))) and not touched[node]):
            continue
        results[place] = _lay_out(output, node, order)
    if isinstance(output.args[0], tuple | list):
        output.args = (tuple(results),)
    else:
        output.args = (results[0],)


def find_order(value: Any) -> Order | None:
    """Return the order in memory of a tensor's dimensions; None where it says nothing, or is not known.

    >>> find_order(torch.ones(2, 3, 4).transpose(1, 2))
    (0, 2, 1)
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.dim() < 2:
        return None
    sizes, strides = list(map(hint_of, value.shape)), list(map(hint_of, value.stride()))
    known = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size is not None]
    if len(known) < value.dim() or any(not stride and size > 1 for size, stride in known):
        return None
    single = [dim for dim, (size, _) in enumerate(known) if size == 1]
    others = [dim for dim, (size, _) in enumerate(known) if size != 1]
    by_stride = sorted(others, key=lambda dim: -(known[dim][1] or 0))
    # A dim of one item lies anywhere: it makes no order of its own.
    return tuple(range(value.dim())) if by_stride == others else (*single, *by_stride)


def before_layout(node: fx.Node) -> fx.Node:
    """Return the node whose value `restore_orders` laid out as the result `node`; any other node as it is."""
    while node.meta.get(LAID_OUT):
        (node,) = node.all_input_nodes
    return node


def _find_touched(gm: fx.GraphModule) -> dict[fx.Node, bool]:
    """Return the nodes computed from what a rewrite made, and whether that was laid out unlike a dense tensor."""
    touched: dict[fx.Node, bool] = {}
    bodies = {body for _, body in find_subgraphs(gm)} - {gm}
    for node in gm.graph.nodes:
        found = [touched[source] for source in node.all_input_nodes if source in touched]
        if "rewritten_by" in node.meta:
            order = find_order(node.meta.get("example_value"))
            found.append(order is None or order != tuple(range(len(order))))
        if node.op == "get_attr" and getattr(gm, str(node.target), None) in bodies:
            found.append(True)
        if found:
            touched[node] = any(found)
    return touched


def _lay_out(output: fx.Node, node: fx.Node, order: Order) -> fx.Node:
    """Return a node before `output` with the value of `node`, dense in memory in that `order`."""
    natural = tuple(range(len(order)))
    inverse = tuple(order.index(dim) for dim in natural)
    steps: list[tuple[Any, tuple[Any, ...]]] = [(contiguous, ())]
    if order != natural:
        steps = [(torch.permute, (order,)), *steps, (torch.permute, (inverse,))]
    for target, args in steps:
        value = node.meta["example_value"]
        with output.graph.inserting_before(output):
            made = output.graph.call_function(target, (node, *args))
        made.meta = dict(node.meta)
        made.meta.pop("rewritten_by", None)
        made.meta[LAID_OUT] = True
        made.meta["example_value"] = target(value, *args)
        node = made
    return node
