"""The invariants that hold before and after every pass over a graph."""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxopt.errors import VerifyError
from fxopt.graph.torch_private import EXIT_AUTOCAST
from fxopt.graph.view import find_subgraphs, location_of, module_of

PLACEHOLDERS = "placeholders"
"""Key of `gm.meta` under which the names of the stock placeholders are noted."""


def note_placeholders(gm: fx.GraphModule) -> None:
    """Note the placeholders of the stock graph `gm` and of its bodies, to which `verify` then holds passes."""
    for _, part in find_subgraphs(gm):
        part.meta[PLACEHOLDERS] = _placeholders_of(part)


def note_items(gm: fx.GraphModule) -> None:
    """Note the example values of items that Dynamo leaves without: those of a tensor's `tolist()`."""
    for _, part in find_subgraphs(gm):
        for node in part.graph.find_nodes(op="call_function", target=operator.getitem):
            source, index = node.args
            values = source.meta.get("example_value") if isinstance(source, fx.Node) else None
            if (
                "example_value" not in node.meta
                and isinstance(values, torch.Tensor)
                and isinstance(index, int)
            ):
                node.meta["example_value"] = values.select(0, index)


def verify(gm: fx.GraphModule, pass_name: str) -> None:
    """Check `gm` and the bodies of its higher-order ops after the pass `pass_name`.

    The graph must be well formed, every value that is read must have an example value, and the placeholders
    must be the stock ones, in order, where `note_placeholders` has noted these.

    Raises:
        VerifyError: naming the pass, and the node where there is one.
    """
    for prefix, part in find_subgraphs(gm):
        _verify_graph(part, prefix, pass_name)


def _verify_graph(gm: fx.GraphModule, prefix: str, pass_name: str) -> None:
    try:
        gm.graph.lint()
    except (RuntimeError, ValueError, AttributeError) as error:
        where = f" of {prefix.rstrip('/')}" if prefix else ""
        raise VerifyError(f"{pass_name}: the graph{where} is malformed, {error}") from error
    names = _placeholders_of(gm)
    stock = gm.meta.get(PLACEHOLDERS, names)
    if names != stock:
        expected, got = ", ".join(stock), ", ".join(names)
        raise VerifyError(f"{pass_name}: the placeholders changed, expected {expected}, got {got}")
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "output") or not node.users or "example_value" in node.meta:
            continue
        if node.op == "call_function" and not _is_read_as_value(node):
            continue
        raise VerifyError(
            f"{pass_name}: {prefix}{node.name} has no example value, expected one on all that is read\n"
            f"at {module_of(node) or 'the root'} ({location_of(node) or 'no source line'})"
        )


def _placeholders_of(gm: fx.GraphModule) -> tuple[str, ...]:
    return tuple(node.name for node in gm.graph.find_nodes(op="placeholder"))


def _is_read_as_value(node: fx.Node) -> bool:
    # What begins autocast returns a handle, which only what ends it reads.
    return any(user.target is not EXIT_AUTOCAST for user in node.users)
