"""The nodes of a graph as plain records: what each computes, from what, where in the model, and how much it writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import fx

from fxopt.graph.purity import MODE_SWITCHES
from fxopt.graph.sizes import num_bytes_of
from fxopt.graph.snapshot import readable_names, short_name, type_text
from fxopt.graph.storage import key_of, keys_of
from fxopt.graph.view import find_subgraphs, location_of, module_of, tensors_of, value_of
from fxopt.report.records import NodeRecord


def node_records(gm: fx.GraphModule) -> tuple[NodeRecord, ...]:
    """Return one record per node of `gm` and of the bodies of its higher-order ops, in graph order.

    A node in a body is named "body/node"; what the body is called with leads into its placeholders.
    """
    parts = list(find_subgraphs(gm))
    feeds = dict(_feeds(parts))
    records: list[NodeRecord] = []
    for prefix, part in parts:
        names = readable_names(part.graph)
        lazy = find_lazy(part.graph)
        for node in part.graph.nodes:
            if node.op == "get_attr" and isinstance(getattr(part, str(node.target), None), fx.GraphModule):
                continue
            sources = feeds.get((prefix, node), [f"{prefix}{each.name}" for each in node.all_input_nodes])
            kind = "lazy" if node in lazy else _kind_of(node)
            records.append(
                NodeRecord(
                    name=f"{prefix}{node.name}",
                    label=names[node],
                    op="" if node.op in ("placeholder", "get_attr", "output") else short_name(node),
                    kind=kind,
                    inputs=tuple(dict.fromkeys(sources)),
                    type=type_text(value_of(node)),
                    bytes=_bytes_added(node) if kind in ("op", "input") else 0,
                    module=module_of(node),
                    location=location_of(node),
                    pattern=str(node.meta.get("rewritten_by", "")),
                    origins=tuple(sorted(node.meta.get("origins", ()))),
                )
            )
    known = {record.name for record in records}
    return tuple(
        dataclasses.replace(record, inputs=tuple(name for name in record.inputs if name in known))
        for record in records
    )


def _feeds(parts: list[tuple[str, fx.GraphModule]]) -> Iterator[tuple[tuple[str, fx.Node], list[str]]]:
    """Yield what leads into each placeholder of a body, and that a body's output leads into its call."""
    by_prefix = dict(parts)
    for prefix, part in parts:
        for attribute in part.graph.find_nodes(op="get_attr"):
            inner = f"{prefix}{attribute.target}/"
            body = by_prefix.get(inner)
            if body is None:
                continue
            holes = [node for node in body.graph.nodes if node.op == "placeholder"]
            for caller in attribute.users:
                given = list(caller.args)[len(caller.args) - len(holes) :] if holes else []
                for hole, value in zip(holes, given, strict=False):
                    if isinstance(value, fx.Node):
                        yield (inner, hole), [f"{prefix}{value.name}"]
                (output,) = body.graph.find_nodes(op="output")
                yield (prefix, caller), [f"{inner}{output.name}"]


def _kind_of(node: fx.Node) -> str:
    """Return "input", "output", "view" (no memory of its own, or no tensor), or "op"."""
    if node.op in ("placeholder", "get_attr"):
        return "input"
    if node.op == "output":
        return "output"
    if node.target in MODE_SWITCHES or not tensors_of(node):
        return "view"
    given = frozenset[int]().union(*(keys_of(source) for source in node.all_input_nodes))
    return "view" if keys_of(node) <= given else "op"


def _bytes_added(node: fx.Node) -> int:
    """Return the bytes of the memory that `node` adds to what it reads: all of an input's."""
    given = frozenset[int]().union(*(keys_of(source) for source in node.all_input_nodes))
    sizes: dict[int, int] = {}
    for value in tensors_of(node):
        if key_of(value) not in given:
            sizes[key_of(value)] = max(sizes.get(key_of(value), 0), num_bytes_of(value))
    return sum(sizes.values())


def find_lazy(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that run only where somebody reads what they lead to: a rewritten head's logits."""
    lazy: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op not in ("output", "placeholder", "get_attr") and (
            node.meta.get("kept") or any(source in lazy for source in node.all_input_nodes)
        ):
            lazy.add(node)
    return lazy
