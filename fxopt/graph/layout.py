"""Canonical forms of views, slices, splits and concatenations."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.graph import vocabulary
from fxopt.graph.arguments import Form, bind, from_last, is_integer, rank_of, same_size, sizes_of
from fxopt.graph.arithmetic import Rule
from fxopt.graph.edit import Editor, num_edges
from fxopt.graph.names import op_name
from fxopt.graph.purity import is_pure
from fxopt.graph.view import is_tensor, shape_of

EVERYTHING = slice(None)


def _reshape(node: fx.Node, editor: Editor) -> Form | None:
    sizes = sizes_of(node)
    if not sizes or not is_tensor(node) or editor.aliases.is_mutated(node):
        # A view that is written through must not become a copy where a rewrite changes the strides.
        return None
    return Form(vocabulary.reshape, (node.args[0],), {"shape": sizes})


def _reshape_as(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "other")
    if bound is None or not is_tensor(bound["other"]):
        return None
    shape = new_sizes(node, bound["other"], range(rank_of(bound["other"])), editor)
    return Form(vocabulary.reshape, (bound["x"],), {"shape": shape})


def _flatten(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", start_dim=0, end_dim=-1)
    if (
        bound is None
        or not is_tensor(bound["x"])
        or rank_of(bound["x"]) == 0
        or 0 in (shape_of(bound["x"]) or ())
    ):
        return None
    x, rank = bound["x"], rank_of(bound["x"])
    start, end = from_last(bound["start_dim"], rank), from_last(bound["end_dim"], rank)
    if start is None or end is None:
        return None
    before = new_sizes(node, x, range(start + rank), editor)
    after = new_sizes(node, x, range(end + rank + 1, rank), editor)
    return Form(vocabulary.reshape, (x,), {"shape": (*before, -1, *after)})


def _unflatten(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "dim", "sizes")
    if bound is None or not is_tensor(bound["x"]):
        return None
    x, rank, sizes = bound["x"], rank_of(bound["x"]), bound["sizes"]
    dim = from_last(bound["dim"], rank)
    if dim is None or not isinstance(sizes, list | tuple) or not all(is_integer(size) for size in sizes):
        return None
    before = new_sizes(node, x, range(dim + rank), editor)
    after = new_sizes(node, x, range(dim + rank + 1, rank), editor)
    return Form(vocabulary.reshape, (x,), {"shape": (*before, *sizes, *after)})


def new_sizes(node: fx.Node, x: fx.Node, dims: range, editor: Editor) -> tuple[Any, ...]:
    """Return the sizes of `dims` of `x`, which `node` is to read: ints where they are static, else nodes."""
    shape = shape_of(x) or ()
    return spell_sizes(node, [shape[dim] for dim in dims], editor)


def spell_sizes(node: fx.Node, sizes: Sequence[Any], editor: Editor) -> tuple[Any, ...]:
    """Return sizes that `node` is to read: ints where they are static, else nodes.

    A symbol that is an input of the graph is read as such, any other of the first tensor that has it: a node that reads
    another one would keep that alive, and be a reader of what a pattern takes away.
    """
    found: list[Any] = []
    for size in sizes:
        if not isinstance(size, int):
            given = editor.graph.find_nodes(op="placeholder")
            known = (item for item in given if same_size(item.meta.get("example_value"), size))
            size = next(known, None) or editor.insert_before(
                node, "size", _first_with(size, editor), {}, size
            )
        found.append(size)
    return tuple(found)


def _first_with(size: Any, editor: Editor) -> tuple[fx.Node, int]:
    """Return the first tensor of the graph with a dim of this symbolic size, and which dim."""
    return next(
        (item, dim)
        for item in editor.graph.nodes
        if is_tensor(item)
        for dim, other in enumerate(shape_of(item) or ())
        if same_size(other, size)
    )


def _repeat(node: fx.Node, editor: Editor) -> Form | None:
    times = sizes_of(node)
    is_known = times and is_tensor(node) and len(times) == rank_of(node) and all(map(is_integer, times))
    return Form(torch.tile, (node.args[0],), {"dims": tuple(times or ())}) if is_known else None


def _expand(node: fx.Node, editor: Editor) -> Form | None:
    sizes = sizes_of(node)
    if not sizes or not is_tensor(node) or not is_tensor(node.args[0]):
        return None
    return Form(vocabulary.expand, (node.args[0],), {"shape": sizes})


def _contiguous(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", memory_format=torch.contiguous_format)
    if bound is None or bound["memory_format"] is not torch.contiguous_format:
        return None
    return Form(vocabulary.contiguous, (bound["x"],), {})


def _transpose(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "dim0", "dim1")
    return _swapped(bound["x"], bound["dim0"], bound["dim1"]) if bound else None


def _t(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x")
    return _swapped(bound["x"], -2, -1) if bound and rank_of(bound["x"]) == 2 else None


def _tensor_attribute(node: fx.Node, editor: Editor) -> Form | None:
    x, name = node.args[:2]
    return _attribute(x, name) if isinstance(name, str) else None


def _attribute_as_op(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x")
    return _attribute(bound["x"], op_name(node)) if bound else None


def _attribute(x: Any, name: str) -> Form | None:
    if is_tensor(x) and (name == "mT" or (name == "T" and rank_of(x) == 2)):
        return _swapped(x, -2, -1)
    return None


def _swapped(x: Any, dim0: Any, dim1: Any) -> Form | None:
    if not is_tensor(x):
        return None
    dims = [from_last(dim, rank_of(x)) for dim in (dim0, dim1)]
    if None in dims:
        return None
    first, second = sorted(dim for dim in dims if dim is not None)
    return Form(torch.transpose, (x,), {"dim0": first, "dim1": second})


def _permute(node: fx.Node, editor: Editor) -> Form | None:
    sizes = sizes_of(node)
    if sizes is None or not is_tensor(node.args[0]):
        return None
    x: Any = node.args[0]
    dims = tuple(from_last(dim, rank_of(x)) for dim in sizes)
    moved = [place for place, dim in enumerate(dims) if dim != place - len(dims)]
    if None in dims:
        return None
    if len(moved) == 2:
        return _swapped(x, *moved)
    return Form(torch.permute, (x,), {"dims": dims})


def _unsqueeze(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "dim")
    if bound is None or not is_tensor(bound["x"]):
        return None
    dim = from_last(bound["dim"], rank_of(bound["x"]) + 1)
    return None if dim is None else _unsqueezed(node, bound["x"], dim, editor)


def _unsqueezed(node: fx.Node, x: fx.Node, dim: int, editor: Editor) -> Form:
    """Return `x` with a new dim; that over which `x` was reduced, where nothing else reads it, is a dim kept."""
    aliases, reduced = editor.aliases, x.kwargs.get("dim")
    is_back = reduced in (dim, (dim,)) and x.kwargs.get("keepdim") is False and is_pure(x)
    is_written = any(map(aliases.is_mutated, (node, *x.all_input_nodes)))
    if is_back and num_edges(x) == 1 and not (is_written or aliases.is_returned(node)):
        node.meta["origins"] = node.meta["origins"] | x.meta["origins"]
        return Form(x.target, x.args, {**x.kwargs, "keepdim": True})
    return Form(torch.unsqueeze, (x,), {"dim": dim})


def _squeeze(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "dim")
    if bound is None or not is_tensor(bound["x"]):
        return None
    dim = from_last(bound["dim"], rank_of(bound["x"]))
    return None if dim is None else Form(torch.squeeze, (bound["x"],), {"dim": dim})


def _getitem(node: fx.Node, editor: Editor) -> Form | None:
    """Return the index with as few full slices as there can be; one new dim and no slice is an unsqueeze."""
    x, index = node.args
    if not isinstance(x, fx.Node) or not is_tensor(x):
        return None
    index = index if isinstance(index, tuple) else (index,)
    if not all(item is None or item is ... or is_integer(item) or isinstance(item, slice) for item in index):
        return None
    rank = rank_of(x)
    entries = _expanded(index, rank)
    if entries is None:
        return None
    shape = iter(shape_of(x) or ())
    entries = [entry if entry is None else _plain(entry, next(shape)) for entry in entries]
    if entries.count(None) == 1 and entries.count(EVERYTHING) == rank:
        return _unsqueezed(node, x, entries.index(None) - rank - 1, editor)
    leading = next((place for place, entry in enumerate(entries) if entry != EVERYTHING), len(entries))
    if leading:
        return Form(operator.getitem, (x, (..., *entries[leading:])), {})
    while entries and entries[-1] == EVERYTHING:
        entries.pop()
    return Form(operator.getitem, (x, tuple(entries)), {})


def _expanded(index: tuple[Any, ...], rank: int) -> list[Any] | None:
    missing = rank - sum(item is not None and item is not ... for item in index)
    ellipses = [place for place, item in enumerate(index) if item is ...]
    if len(ellipses) > 1 or missing < 0:
        return None
    place = ellipses[0] if ellipses else len(index)
    return [*index[:place], *[EVERYTHING] * missing, *index[place + 1 :]]


def _plain(entry: Any, size: Any) -> Any:
    """Return a slice without what it says by default; a stop beyond the end is the end."""
    if not isinstance(entry, slice):
        return entry
    start = None if entry.start == 0 and isinstance(entry.start, int) else entry.start
    step = None if entry.step == 1 and isinstance(entry.step, int) else entry.step
    stop = entry.stop
    if isinstance(stop, int) and isinstance(size, int) and stop >= size:
        stop = None
    return slice(start, stop, step)


def _listed(target: Any) -> Rule:
    def rule(node: fx.Node, editor: Editor) -> Form | None:
        bound = bind(node, "tensors", dim=0)
        if bound is None or not isinstance(bound["tensors"], list | tuple) or not is_tensor(node):
            return None
        dim = from_last(bound["dim"], rank_of(node))
        return None if dim is None else Form(target, (tuple(bound["tensors"]),), {"dim": dim})

    return rule


def _chunk(node: fx.Node, editor: Editor) -> Form | None:
    return _pieces(torch.chunk, "chunks", bind(node, "x", "chunks", dim=0))


def _split(node: fx.Node, editor: Editor) -> Form | None:
    name = "split_size" if "split_size" in node.kwargs else "split_size_or_sections"
    bound = bind(node, "x", name, dim=0)
    if bound is not None:
        sizes = bound.pop(name)
        bound["split_size_or_sections"] = tuple(sizes) if isinstance(sizes, list) else sizes
    return _pieces(torch.split, "split_size_or_sections", bound)


def _pieces(target: Any, attribute: str, bound: dict[str, Any] | None) -> Form | None:
    if bound is None or not is_tensor(bound["x"]):
        return None
    dim = from_last(bound["dim"], rank_of(bound["x"]))
    return None if dim is None else Form(target, (bound["x"],), {attribute: bound[attribute], "dim": dim})


def _pad(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "pad", mode="constant", value=None)
    if bound is None or not isinstance(bound["pad"], list | tuple):
        return None
    kwargs = {"pad": tuple(bound["pad"]), "mode": bound["mode"], "value": bound["value"]}
    return Form(F.pad, (bound["x"],), kwargs)


def _repeat_interleave(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "repeats", dim=None, output_size=None)
    if bound is None or not is_tensor(bound["x"]) or not is_integer(bound["repeats"]):
        return None
    dim = None if bound["dim"] is None else from_last(bound["dim"], rank_of(bound["x"]))
    return (
        None if dim is None else Form(torch.repeat_interleave, (bound["x"], bound["repeats"]), {"dim": dim})
    )


RULES: dict[str, Rule] = {
    "view": _reshape,
    "reshape": _reshape,
    "view_as": _reshape_as,
    "reshape_as": _reshape_as,
    "flatten": _flatten,
    "unflatten": _unflatten,
    "repeat": _repeat,
    "tile": _repeat,
    "expand": _expand,
    "broadcast_to": _expand,
    "contiguous": _contiguous,
    "transpose": _transpose,
    "t": _t,
    "getattr": _tensor_attribute,
    "T": _attribute_as_op,
    "mT": _attribute_as_op,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "getitem": _getitem,
    "cat": _listed(torch.cat),
    "stack": _listed(torch.stack),
    "chunk": _chunk,
    "split": _split,
    "pad": _pad,
    "repeat_interleave": _repeat_interleave,
}
