"""A pass over a graph that is about to be lowered: ops of ours write over arguments that nobody reads after them.

An op declares its forms in place (`Declared.in_place`). One is taken where all that it writes to is memory of this
graph's own, and read for the last time: not what forward saved, which may be read again, nor what is returned.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import fx

from fxopt.capture.joint_codes import is_ours
from fxopt.graph.quantized import arguments_of
from fxopt.graph.sizes import span_of
from fxopt.graph.storage import UNKNOWN, key_of
from fxopt.graph.torch_private import schema_of, tree_leaves
from fxopt.kernels.launch import DECLARED, InPlace


def write_in_place(graph: fx.Graph) -> int:
    """Put forms in place where they may stand, and return how many."""
    count = 0
    for node in list(graph.nodes):
        declared = DECLARED.get(node.target) if is_ours(node) else None  # pyright: ignore[reportArgumentType]
        if declared is None or not declared.in_place:
            continue
        lives = _Lives(graph)
        form = next((form for form in declared.in_place if _may_stand(form, node, lives)), None)
        if form is not None:
            _put(form, node)
            count += 1
    return count


class _Lives:
    """Who holds each storage of a graph, and when it is read for the last time."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self._holders: dict[int, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            for key in _keys_of(node):
                self._holders[key].append(node)

    def ends_at(self, node: fx.Node, value: fx.Node) -> bool:
        """Return whether `node` is the last to read the memory of `value`, which is the graph's own."""
        keys = _keys_of(value)
        if len(keys) != 1 or UNKNOWN in keys:
            return False
        holders = [holder for key in keys for holder in self._holders[key]]
        return all(
            holder.op == "call_function"
            and all(
                user in holders or ("val" in user.meta and self.order[user] <= self.order[node])
                for user in holder.users
            )
            for holder in holders
        )


def _keys_of(node: fx.Node) -> frozenset[int]:
    """Return the storages of the tensors in the value of `node`."""
    leaves = tree_leaves(node.meta.get("val"))
    return frozenset(key_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))


def _may_stand(form: InPlace, node: fx.Node, lives: _Lives) -> bool:
    """Return whether `form` may stand for `node`."""
    given = arguments_of(node)
    written = written_by(form, given)
    read: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), read.append)
    times = Counter(key for item in read for key in _keys_of(item))
    alone = all(times[key] == 1 for item in written for key in _keys_of(item))
    values = list(node.meta["val"])
    fits = all(_fits(values[number], given[name]) for number, name in form.results.items())
    num_left = len([value for number, value in enumerate(values) if number not in form.results])
    is_complete = num_left == len(schema_of(form.op).returns) and all(
        isinstance(value, torch.Tensor) for number, value in enumerate(values) if number not in form.results
    )
    return (
        bool(written)
        and alone
        and fits
        and is_complete
        and all(lives.ends_at(node, item) for item in written)
    )


def written_by(form: InPlace, given: dict[str, Any]) -> list[fx.Node]:
    """Return the arguments, of those `given` by name, that `form` writes to."""
    named = [
        a.name for a in schema_of(form.op).arguments if a.alias_info is not None and a.alias_info.is_write
    ]
    return [given[name] for name in named if isinstance(given[name], fx.Node)]


def _fits(value: Any, argument: Any) -> bool:
    """Return whether a result may be left in an argument: neither is there, or both are dense and alike."""
    if not isinstance(value, torch.Tensor) or not isinstance(argument, fx.Node):
        return value is None and argument is None
    place = argument.meta["val"]
    alike = place.shape == value.shape and place.dtype == value.dtype and place.stride() == value.stride()
    return bool(alike) and place.is_contiguous() and span_of(place) == place.numel()


def _put(form: InPlace, node: fx.Node) -> None:
    """Let `form` stand for `node`, whose users read its results."""
    graph = node.graph
    given = arguments_of(node)
    values: list[Any] = list(node.meta["val"])
    left = [number for number in range(len(values)) if number not in form.results]
    with graph.inserting_before(node):
        new = graph.call_function(form.op, node.args, node.kwargs)
    new.meta = {key: item for key, item in node.meta.items() if key not in ("val", "tensor_meta")}
    new.meta["val"] = (
        None if not left else values[left[0]] if len(left) == 1 else tuple(values[n] for n in left)
    )
    for user in list(node.users):
        assert user.target is operator.getitem, "an op of several results is read as a whole"
        number: Any = user.args[1]
        if number in form.results:
            user.replace_all_uses_with(given[form.results[number]])
            graph.erase_node(user)
        elif len(left) == 1:
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        else:
            user.args = (new, left.index(number))
    graph.erase_node(node)
