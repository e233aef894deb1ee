"""Split a rewritten model graph into what runs now and what runs only if its logits are read, and run it."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import fx

from fxopt.capture.lazy import LazyLogits, LogitsSource
from fxopt.capture.lowering import Lowering
from fxopt.graph.aliases import Aliases
from fxopt.graph.purity import MODE_SWITCHES, mutated_inputs
from fxopt.graph.storage import UNKNOWN
from fxopt.graph.torch_private import evaluate, expression_of
from fxopt.graph.view import location_of, requires_grad, results_of, value_of


@dataclasses.dataclass(frozen=True)
class Piece:
    """One graph cut out of a larger one: it reads `inputs` and returns `outputs`, nodes of the larger one."""

    graph: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


@dataclasses.dataclass(frozen=True)
class Segments:
    """How a rewritten graph is split: `lazy` holds what is computed only when read, `cuts` where the rest is cut.

    `write` says why nothing is split: something is written to in place, and what ran later would read that;
    `unkept` whether there would have been anything to compute later.
    """

    lazy: frozenset[fx.Node]
    cuts: tuple[frozenset[fx.Node], ...]
    write: str | None = None
    unkept: bool = False


def find_segments(gm: fx.GraphModule) -> Segments:
    """Return how to split `gm`.

    It is cut where the lazy part reads it, so that a value which only the lazy part and a later node read
    costs no gradient of zeros; and at outputs that other outputs are computed from, so that the gradient of a
    loss flows through the logits that were returned with it.
    """
    results = results_of(gm)
    lazy = _find_lazy_nodes(gm)
    if not any(node in lazy for node in results):
        lazy = set()
    cuts = [frozenset({node}) for node in dict.fromkeys(results) if _is_read_on(node, lazy)]
    read = [node for node in gm.graph.nodes if node not in lazy and any(user in lazy for user in node.users)]
    computed = frozenset(node for node in read if node.op not in ("placeholder", "get_attr"))
    if computed:
        cuts.append(computed)
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    segments = Segments(
        frozenset(lazy), tuple(sorted(cuts, key=lambda cut: max(map(order.__getitem__, cut))))
    )
    write = _find_write(gm, segments) if lazy or cuts else None
    if write is not None:
        return Segments(frozenset(), (), write, bool(lazy))
    return segments


def parts_of(gm: fx.GraphModule, segments: Segments) -> list[set[fx.Node]]:
    """Return what runs now, part by part: what each cut is computed from, then the rest."""
    rest = {
        node: None
        for node in gm.graph.nodes
        if node.op not in ("placeholder", "output", "get_attr")
        and node not in segments.lazy
        and node.target not in MODE_SWITCHES
    }
    parts: list[set[fx.Node]] = []
    for cut in segments.cuts:
        ancestors = {node for root in cut for node in _computed_ancestors(root) if node in rest}
        parts.append(_with_items(ancestors, rest))
        for node in parts[-1]:
            del rest[node]
    return [part for part in (*parts, set(rest)) if part]


def _with_items(part: set[fx.Node], rest: Container[fx.Node]) -> set[fx.Node]:
    """Return `part` with all items of the tuples in it that are in `rest`: what a part hands on are tensors."""
    found, queue = set(part), list(part)
    while queue:
        node = queue.pop()
        if not isinstance(value_of(node), tuple | list):
            continue
        items = {user for user in node.users if user.target is operator.getitem and user in rest} - found
        found |= items
        queue.extend(items)
    return found


def _is_read_on(node: Any, lazy: set[fx.Node]) -> bool:
    """Return whether a result of the graph is one that later nodes compute from, with gradients."""
    if not isinstance(node, fx.Node) or node in lazy or node.op in ("placeholder", "get_attr"):
        return False
    return requires_grad(node) and any(user.op != "output" and user not in lazy for user in node.users)


def _find_lazy_nodes(gm: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that a rewrite kept only for the graph's output, and what follows from these alone."""
    lazy: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "output" or node.target in MODE_SWITCHES:
            continue
        if node.meta.get("kept") or (node.all_input_nodes and any(i in lazy for i in node.all_input_nodes)):
            lazy.add(node)
    changed = True
    while changed:
        changed = False
        for node in list(lazy):
            if any(user.op != "output" and user not in lazy for user in node.users):
                lazy.discard(node)
                changed = True
    return lazy


def _find_write(gm: fx.GraphModule, segments: Segments) -> str | None:
    """Return why `gm` may not be split, or None: something is written to in place that two parts of it may touch."""
    writes = [
        node
        for node in gm.graph.nodes
        if node.op in ("call_function", "call_method") and mutated_inputs(node)
    ]
    if not writes:
        return None
    aliases, parts = Aliases(gm.graph), parts_of(gm, segments)
    for node in writes:
        keys = frozenset[int]().union(*map(aliases.keys_of, mutated_inputs(node)))
        holders = {holder for key in keys for holder in aliases.holders[key]}
        touching = {user for holder in holders for user in holder.users if user.op != "output"} | holders
        if UNKNOWN in keys or not any(touching <= part for part in parts):
            return f"{node.name} at {location_of(node)} writes in place"
    return None


def cut_piece(gm: fx.GraphModule, nodes: set[fx.Node], outputs: tuple[fx.Node, ...]) -> Piece:
    """Return `nodes` of `gm` as a graph of its own that returns `outputs`; mode switches come along."""
    inputs = tuple(
        node
        for node in gm.graph.nodes
        if node not in nodes
        and node.target not in MODE_SWITCHES
        and any(user in nodes for user in node.users)
    )
    passed = tuple(node for node in outputs if node not in nodes and node not in inputs)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in (*inputs, *passed):
        if node.op == "get_attr":
            copies[node] = graph.node_copy(node)
            continue
        copy = graph.placeholder(node.name)
        copy.meta = dict(node.meta)
        copies[node] = copy
    for node in gm.graph.nodes:
        if node in nodes or node.target in MODE_SWITCHES:
            copies[node] = graph.node_copy(node, lambda old: copies[old])
    graph.output(tuple(copies[node] for node in outputs))
    graph.lint()
    piece = fx.GraphModule(gm, graph)
    real_inputs = tuple(node for node in (*inputs, *passed) if node.op != "get_attr")
    return Piece(piece, real_inputs, outputs)


def compile_model_graph(
    gm: fx.GraphModule, example_inputs: list[Any], lower: Lowering, segments: Segments
) -> Callable[..., Any]:
    """Return a callable for the rewritten `gm`; outputs that a rewrite kept come back as `LazyLogits`.

    `example_inputs` are what Dynamo gave: a symbolic float among them is a tensor that AOTAutograd must be handed
    itself, not its `example_value`. An input that is an output too comes back as it is, not as a view of it: who
    retains its gradient means that of the tensor which the blocks were given.
    """
    lazy, results = set(segments.lazy), results_of(gm)
    passes_on = any(isinstance(node, fx.Node) and node.op == "placeholder" for node in results)
    if not lazy and not segments.cuts and not passes_on:
        return lower(gm, example_inputs)
    placeholders = tuple(node for node in gm.graph.nodes if node.op == "placeholder")
    given = dict(zip(placeholders, example_inputs, strict=True))
    pieces: list[tuple[Piece, Callable[..., Any]]] = []
    for part in parts_of(gm, segments):
        outputs = tuple(
            node for node in gm.graph.nodes if node in part and any(user not in part for user in node.users)
        )
        piece = cut_piece(gm, part, outputs)
        examples = [given.get(node, node.meta["example_value"]) for node in piece.inputs]
        pieces.append((piece, lower(piece.graph, examples)))
    lazy_outputs = tuple(dict.fromkeys(node for node in results if node in lazy))
    if not lazy_outputs:
        return functools.partial(_run_pieces, pieces, placeholders, results)
    lazy_piece = cut_piece(gm, lazy, lazy_outputs)
    forms = [node.meta["example_value"] for node in lazy_outputs]
    location = location_of(lazy_outputs[0])
    needs_grad = [bool(form.requires_grad) for form in forms]

    def run(*args: Any) -> tuple[Any, ...]:
        values = _compute(pieces, placeholders, args)
        source = LogitsSource(lazy_piece.graph, tuple(values[node] for node in lazy_piece.inputs), location)
        shapes = _shapes_of(lazy_outputs, values, placeholders)
        for index, node in enumerate(lazy_outputs):
            form = torch.empty(shapes[index], dtype=forms[index].dtype, device="meta")
            values[node] = LazyLogits.make(source, index, form, forms[index].device, needs_grad[index])
        return tuple(values[node] if isinstance(node, fx.Node) else node for node in results)

    return run


def _compute(
    pieces: list[tuple[Piece, Callable[..., Any]]], placeholders: tuple[fx.Node, ...], args: tuple[Any, ...]
) -> dict[fx.Node, Any]:
    values: dict[fx.Node, Any] = dict(zip(placeholders, args, strict=True))
    for piece, call in pieces:
        out = call(*[values[node] for node in piece.inputs])
        values.update(zip(piece.outputs, out, strict=True))
    return values


def _run_pieces(
    pieces: list[tuple[Piece, Callable[..., Any]]],
    placeholders: tuple[fx.Node, ...],
    results: tuple[Any, ...],
    *args: Any,
) -> tuple[Any, ...]:
    values = _compute(pieces, placeholders, args)
    return tuple(values[node] if isinstance(node, fx.Node) else node for node in results)


def _computed_ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current in seen or current.op in ("placeholder", "get_attr"):
            continue
        seen.add(current)
        queue.extend(current.all_input_nodes)
    return seen


def _shapes_of(
    nodes: tuple[fx.Node, ...], values: dict[fx.Node, Any], placeholders: tuple[fx.Node, ...]
) -> list[tuple[int, ...]]:
    """Return the sizes of `nodes` at this call: symbolic ones from the sizes of the tensors at hand."""
    known: dict[str, int] = {}
    for node, value in values.items():
        example = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and isinstance(example, torch.Tensor):
            known.update(
                (str(symbol), size)
                for symbol, size in zip(example.shape, value.shape, strict=True)
                if not isinstance(symbol, int)
            )
        elif isinstance(value, int) and isinstance(example, torch.SymInt):
            known[str(example)] = value
    shapes: list[tuple[int, ...]] = []
    for node in nodes:
        sizes = node.meta["example_value"].shape
        shapes.append(tuple(size if isinstance(size, int) else _evaluate(size, known) for size in sizes))
    return shapes


def _evaluate(size: torch.SymInt, known: dict[str, int]) -> int:
    expression = expression_of(size)
    return int(evaluate(expression, {symbol: known[str(symbol)] for symbol in expression.free_symbols}))
