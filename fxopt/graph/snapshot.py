"""A graph as text, one line per node, and as counts of its ops; made to be compared before and after."""

from __future__ import annotations

import collections
import re
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.graph.names import op_name
from fxopt.graph.view import find_subgraphs, location_of

SHORT_DTYPES = {
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
}
LIFTED = re.compile(r"^l_[a-z]+_(?=modules_|parameters_|buffers_)|_$", re.IGNORECASE)
HOLDER = re.compile(r"(^|_)(?:modules|parameters|buffers)_")


def snapshot(gm: fx.GraphModule, *, numbered: bool = False, locations: bool = False) -> str:
    """Return `gm` and the bodies of its higher-order ops as text, the same for the same graph.

    Nodes keep their names, so that a diff of two snapshots shows what a pass changed; with `numbered` they
    are numbered, so that graphs that compute the same alike have the same text.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> x.meta["example_value"] = torch.ones(2, 3)
    >>> _ = graph.output(graph.call_function(torch.neg, (x,)))
    >>> print(snapshot(fx.GraphModule({}, graph)))
    x: f32[2, 3] = placeholder
    neg = neg(x)
    return neg
    """
    lines: list[str] = []
    for prefix, part in find_subgraphs(gm):
        if prefix:
            lines.append(f"{prefix.rstrip('/')}:")
        indent = "  " * prefix.count("/")
        names = readable_names(part.graph, numbered)
        lines.extend(indent + line_of(node, names, locations) for node in part.graph.nodes)
    return "\n".join(lines)


def count_ops(gm: fx.GraphModule) -> collections.Counter[str]:
    """Return how often each op is called in `gm` and the bodies of its higher-order ops."""
    return collections.Counter(
        short_name(node)
        for _, part in find_subgraphs(gm)
        for node in part.graph.nodes
        if node.op in ("call_function", "call_method")
    )


def short_name(node: fx.Node) -> str:
    """Return the name of the op that `node` calls, as snapshots print it."""
    name = op_name(node)
    if node.op == "call_method":
        return f".{name}"
    return name or str(getattr(node.target, "__name__", node.target))


def readable_names(graph: fx.Graph, numbered: bool = False) -> dict[fx.Node, str]:
    """Return a name for each node, those of lifted parameters as the model has them, each name once."""
    if numbered:
        return {node: f"%{place}" for place, node in enumerate(graph.nodes)}
    names: dict[fx.Node, str] = {}
    taken: set[str] = set()
    for node in graph.nodes:
        name = _lifted_name(node.name) if node.op == "placeholder" else node.name
        names[node] = node.name if not name or name in taken else name
        taken.add(names[node])
    return names


def _lifted_name(name: str) -> str:
    """Return "layers.0.mlp.weight" for the name that Dynamo gives to a lifted parameter."""
    return HOLDER.sub(".", LIFTED.sub("", name)).lstrip(".")


def line_of(node: fx.Node, names: dict[fx.Node, str], locations: bool = False) -> str:
    """Return one node as snapshots print it; `names` come from `readable_names`."""
    if node.op == "output":
        return f"return {_text(node.args[0], names)}"
    kind = type_text(node.meta.get("example_value"))
    head = f"{names[node]}: {kind}" if kind else names[node]
    if node.op == "placeholder":
        return f"{head} = placeholder"
    if node.op == "get_attr":
        return f"{head} = {node.target}"
    arguments = [_text(item, names) for item in node.args]
    arguments += [f"{name}={_text(item, names)}" for name, item in node.kwargs.items()]
    where = f"  # {location_of(node)}" if locations and location_of(node) else ""
    return f"{head} = {short_name(node)}({', '.join(arguments)}){where}"


def _text(item: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(item, fx.Node):
        return names[item]
    if isinstance(item, tuple):
        inner = ", ".join(_text(part, names) for part in item)
        return f"({inner},)" if len(item) == 1 else f"({inner})"
    if isinstance(item, list):
        return f"[{', '.join(_text(part, names) for part in item)}]"
    if isinstance(item, slice):
        ends = [_text(part, names) if part is not None else "" for part in (item.start, item.stop)]
        return ":".join(ends) + (f":{_text(item.step, names)}" if item.step is not None else "")
    if item is ...:
        return "..."
    if isinstance(item, torch.dtype):
        return SHORT_DTYPES.get(item, str(item))
    return repr(item)


def type_text(value: Any) -> str:
    """Return "f32[2, 16]" for an example value, a list of these for several tensors, "" for what has no form.

    >>> type_text(torch.ones(2, 3)), type_text((torch.ones(1), 4))
    ('f32[2, 3]', '')
    """
    if isinstance(value, Tensor):
        dtype = SHORT_DTYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float):
        return str(value)
    return ""
