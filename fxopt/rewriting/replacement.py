"""What comes in the place of a match: checked on example values, run on real ones, put into the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.graph import vocabulary
from fxopt.graph.edit import PROVENANCE
from fxopt.graph.storage import keys_of
from fxopt.graph.torch_private import leaving_no_symbols, quiet_fakes, tree_leaves, tree_map_only
from fxopt.rewriting.failures import cure_of, function_place, kinds_of, said_by
from fxopt.rewriting.modes import autocast_scope
from fxopt.rewriting.pattern import Call, Match
from fxopt.rewriting.trees import items_of

OTHERWISE = "mend it, or give a check that leaves this form out"


def evaluate_examples(match: Match, outputs: Sequence[Call | fx.Node]) -> dict[int, Any] | str:
    """Return the example value of each call of a replacement, by its id, or what is wrong with it.

    It must return as many outputs as the match has, of the same dtypes and ranks, from the match's inputs.
    """
    values, main = (*match.outputs, *match.exports.values()), find_main_call(outputs)
    called = main.target if main else match.pattern.replace
    where = f"replacement {function_place(called)}"
    if len(outputs) != len(values):
        return f"{where} returned {len(outputs)} outputs, expected {len(values)}; return as many"
    strangers = [node for node in _walk_nodes(outputs) if node not in match.inputs]
    if strangers:
        return f"{where} reads {strangers[0].name}, expected inputs of the match only; read these"
    known: dict[int, Any] = {}
    for old, item in zip(values, outputs, strict=True):
        example = old.meta["example_value"]
        try:
            scope = _fake_mode_of(match)
            with autocast_scope(match.autocast), leaving_no_symbols(scope), quiet_fakes():
                found = evaluate_call(item, lambda node: node.meta["example_value"], scope, known)
        except Exception as error:
            cure = cure_of(error, OTHERWISE)
            return f"replacement {function_place(called, error)} raised {said_by(error)}; {cure}"
        if not isinstance(found, torch.Tensor):
            return (
                f"{where} returned {kinds_of(items_of(found))} for one output, expected a tensor; return one"
            )
        if found.dtype != example.dtype or found.dim() != example.dim() or found.device != example.device:
            got = f"{found.dtype} with {found.dim()} dims on {found.device}"
            expected = f"{example.dtype} with {example.dim()} on {example.device}"
            return f"{where} returned {got}, expected {expected}; {OTHERWISE}"
    return known


def share_storages(
    match: Match, outputs: Sequence[Call | fx.Node], examples: dict[int, Any], written: frozenset[int]
) -> str:
    """Have what replaces a value that is written to lie in the storage of that value, or return why it cannot.

    Views of a value and writes to it are known by its storage, to matches that are still to come as well.
    """
    for old, item in zip((*match.outputs, *match.exports.values()), outputs, strict=True):
        if keys_of(old).isdisjoint(written):
            continue
        stock, new = old.meta["example_value"], examples.get(id(item))
        if new is None:
            return f"{old.name} is written to in place, expected memory of its own in its place, got an input"
        forms = [f"{tuple(value.shape)} with strides {value.stride()}" for value in (stock, new)]
        if forms[0] != forms[1]:
            return f"{old.name} is written to in place, expected {forms[0]} in its place, got {forms[1]}"
        examples[id(item)] = stock
    return ""


def evaluate_call(
    item: Any, value_of: Callable[[fx.Node], Any], scope: Any = None, known: dict[int, Any] | None = None
) -> Any:
    """Return what a replacement computes when its nodes have the values that `value_of` gives them.

    A call that stands in two places runs once: share `known` between the outputs of one replacement.
    """
    known = {} if known is None else known
    if isinstance(item, fx.Node):
        return value_of(item)
    if not isinstance(item, Call):
        return item
    if id(item) not in known:
        args, kwargs = tree_map_only(
            (Call, fx.Node),
            lambda inner: evaluate_call(inner, value_of, scope, known),
            (item.args, dict(item.kwargs)),
        )
        with scope or contextlib.nullcontext():
            known[id(item)] = item.target(*args, **kwargs)
    return known[id(item)]


def insert_call(
    graph: fx.Graph, item: Any, match: Match, examples: dict[int, Any], inserted: dict[int, fx.Node]
) -> Any:
    """Insert a replacement's calls at the graph's insertion point and return the node of the outermost.

    `inserted` holds the new nodes by their call, so that a call that stands in two places is inserted once.
    """
    if not isinstance(item, Call):
        return item
    if id(item) in inserted:
        return inserted[id(item)]
    args, kwargs = tree_map_only(
        Call,
        lambda inner: insert_call(graph, inner, match, examples, inserted),
        (item.args, dict(item.kwargs)),
    )
    node = graph.call_function(item.target, args, kwargs)
    source = match.outputs[0]
    node.meta = {key: source.meta[key] for key in PROVENANCE if key in source.meta}
    node.meta["rewritten_by"] = match.pattern.name
    node.meta["origins"] = match.origins
    node.meta["example_value"] = examples[id(item)]
    inserted[id(item)] = node
    return node


def _fake_mode_of(match: Match) -> Any:
    examples = (node.meta.get("example_value") for node in (*match.inputs, *match.nodes))
    return next((mode for value in examples if (mode := getattr(value, "fake_mode", None)) is not None), None)


def find_main_call(outputs: Iterable[Any]) -> Call | None:
    """Return the call that a replacement is about: the outermost that is not of the canonical vocabulary."""
    calls = list(_walk_calls(outputs))
    fused = (call for call in calls if call.target not in vocabulary.BY_TARGET)
    return next(fused, calls[0] if calls else None)


def count_calls(outputs: Iterable[Any]) -> int:
    """Return how many nodes a replacement inserts; a call that stands in two places is inserted once."""
    return len({id(call) for call in _walk_calls(outputs)})


def _walk_calls(items: Iterable[Any]) -> Iterator[Call]:
    for item in tree_leaves(list(items)):
        if isinstance(item, Call):
            yield item
            yield from _walk_calls((*item.args, *item.kwargs.values()))


def _walk_nodes(items: Iterable[Any]) -> Iterator[fx.Node]:
    for item in tree_leaves(list(items)):
        if isinstance(item, fx.Node):
            yield item
        elif isinstance(item, Call):
            yield from _walk_nodes((*item.args, *item.kwargs.values()))
