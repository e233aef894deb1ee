"""How each node of a joint graph treats rows: tokens that an op never mixes, so that it may run on some at a time.

A value's *kind* says where its rows are: its first dimensions together, its second dimension (a transposed matrix),
nowhere. A rule of an op is a fact about it alone: on some rows of its operands it gives these rows of its result, or a
sum over rows of which the parts add up. So any assignment that all rules agree with is right.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.graph.torch_private import schema_of
from fxopt.remat.cost import Declarations, op_of, tensors_in


@dataclasses.dataclass(frozen=True)
class Kind:
    """Where the rows of a value are: `leading` dimensions together, the second of two, or summed up."""

    name: str
    leading: int = 0

    @property
    def is_sliced(self) -> bool:
        """Whether there are rows to take some of."""
        return self.name in ("rows", "columns")


WHOLE, COLUMNS, SUM, OTHER = Kind("whole"), Kind("columns"), Kind("sum"), Kind("other")
"""A value that is read whole, and hangs on no rows; a transposed one; a sum over rows; rows in some other way."""
SAME = ("alias", "detach", "_to_copy", "zeros_like", "ones_like", "full_like", "empty_like")
"""Ops beside those tagged pointwise whose result has an item for each of their operand's."""
SHAPED = ("view", "reshape", "_unsafe_view", "expand", "slice_backward")
"""Ops whose second argument is the shape of the result."""
ALONG = {"slice": 1, "select": 1, "split": 2, "split_with_sizes": 2, "sum": 1, "mean": 1}
"""Ops along dimensions, and the place of the argument that names these."""
REDUCING = ("sum", "mean")


@dataclasses.dataclass(frozen=True)
class Rows:
    """What is known of one joint graph: its rows, the kind of each value, and which nodes may run on some rows."""

    shape: tuple[int, ...]
    kinds: dict[fx.Node, Any]
    divisible: frozenset[fx.Node]

    @property
    def count(self) -> int:
        """The number of rows."""
        return math.prod(self.shape)

    def kind_of(self, node: fx.Node) -> Kind:
        """Return the kind of a value that is one tensor; of any other, that it is whole."""
        kind = self.kinds.get(node, WHOLE)
        return kind if isinstance(kind, Kind) else WHOLE

    def kinds_of(self, node: fx.Node) -> list[Kind]:
        """Return the kinds of all tensors in a node's value."""
        kind = self.kinds.get(node, WHOLE)
        return [kind] if isinstance(kind, Kind) else list(kind)


def read_rows(graph: fx.Graph, shape: tuple[int, ...], declared: Declarations) -> Rows:
    """Return how the nodes of a joint graph treat rows, of which a block's input has so many, in this shape."""
    kinds: dict[fx.Node, Any] = {}
    divisible: set[fx.Node] = set()
    reader = _Reader(shape, kinds, declared)
    for node in graph.nodes:
        found = reader.follow(node)
        if found is not None:
            divisible.add(node)
        kinds[node] = reader.by_shape(node) if found is None else found
    return Rows(shape, kinds, frozenset(divisible))


class _Reader:
    """Finds the kind of a node's value from those of its operands."""

    def __init__(self, shape: tuple[int, ...], kinds: dict[fx.Node, Any], declared: Declarations) -> None:
        self.shape, self.kinds, self.declared = shape, kinds, declared
        self.count = math.prod(shape)

    def all_of(self, node: fx.Node) -> list[Kind]:
        kind = self.kinds[node]
        return [kind] if isinstance(kind, Kind) else kind

    def by_shape(self, node: fx.Node) -> Any:
        """Return the kind of what nothing is known to compute: its first dimensions are rows where they are as many."""
        value = node.meta.get("val")
        hangs_on_rows = any(kind != WHOLE for item in node.all_input_nodes for kind in self.all_of(item))
        if not isinstance(value, Tensor):
            return [self.leading_of(item) or OTHER if hangs_on_rows else WHOLE for item in tensors_in(value)]
        if node.op == "placeholder":
            return (tuple(value.shape[:-1]) == self.shape and self.leading_of(value)) or WHOLE
        return (self.leading_of(value) or OTHER) if hangs_on_rows else WHOLE

    def leading_of(self, value: Tensor) -> Kind | None:
        """Return by how many first dimensions of `value` its rows are counted, in the block's own shape or as one."""
        if value.ndim > len(self.shape) and tuple(value.shape[: len(self.shape)]) == self.shape:
            return Kind("rows", len(self.shape))
        return Kind("rows", 1) if value.ndim and value.shape[0] == self.count else None

    def follow(self, node: fx.Node) -> Any:
        """Return the kind of the value of `node` where it runs on some rows at a time, else None."""
        if not any(
            kind.is_sliced or kind == SUM for item in node.all_input_nodes for kind in self.all_of(item)
        ):
            return None
        if node.target is operator.getitem:
            return self._follow_item(node)
        op = op_of(node)
        if op is None or not _is_all_tensors(node):
            return None
        known = self.declared.get(op)
        if known is not None and known.rows:
            return self._follow_declared(node, known.rows)
        if op.namespace not in ("aten", "prims"):
            return None
        name = schema_of(op).name.partition("::")[2]
        if torch.Tag.pointwise in op.tags or name in SAME:
            return self._follow_pointwise(node)
        rule = RULES.get(name)
        return None if rule is None else rule(self, node)

    def _follow_item(self, node: fx.Node) -> Kind | None:
        """Return the kind of one tensor of a tuple, in which others may be missing."""
        source, place = node.args
        value: Any = source.meta["val"][place]  # pyright: ignore
        before = tensors_in(list(source.meta["val"])[:place])  # pyright: ignore
        return self.all_of(source)[len(before)] if isinstance(value, Tensor) else None  # pyright: ignore

    def _follow_declared(self, node: fx.Node, names: tuple[str, ...]) -> list[Kind] | Kind | None:
        """Return the kinds of an op's results: those that have fewer rows where the operands `names` have."""
        target: Any = node.target
        kinds: set[Kind] = set()
        for argument, item in zip(schema_of(target).arguments, node.args, strict=False):
            inner = [
                i for i in (item if isinstance(item, list | tuple) else [item]) if isinstance(i, fx.Node)
            ]
            if argument.name in names:
                kinds.update(self.kinds[i] for i in inner if isinstance(self.kinds[i], Kind))
            elif any(self.kinds[i] != WHOLE for i in inner):
                return None
        if len(kinds) != 1 or next(iter(kinds)).name != "rows":
            return None
        (kind,) = kinds
        found = [
            kind if self.leading_of(value) == kind and value.ndim > kind.leading else SUM
            for value in tensors_in(node.meta["val"])
        ]
        return found[0] if isinstance(node.meta["val"], Tensor) else found

    def _follow_pointwise(self, node: fx.Node) -> Kind | None:
        value = node.meta["val"]
        kinds = {kind for item in node.all_input_nodes for kind in self.all_of(item) if kind != WHOLE}
        if len(kinds) != 1 or not isinstance(value, Tensor):
            return None
        (kind,) = kinds
        if not kind.is_sliced or value.ndim < (kind.leading or 2):
            return None
        places = range(kind.leading) if kind.name == "rows" else (1,)
        for item in node.all_input_nodes:
            operand = item.meta["val"]
            padded = (1,) * (value.ndim - operand.ndim) + tuple(operand.shape)
            expected = [1 if self.kinds[item] == WHOLE else value.shape[place] for place in places]
            if operand.ndim > value.ndim or [padded[place] for place in places] != expected:
                return None
        return kind if kind.is_sliced and self._has_rows(value, kind) else None

    def _has_rows(self, value: Tensor, kind: Kind) -> bool:
        if kind == COLUMNS:
            return value.ndim == 2 and value.shape[1] == self.count
        return math.prod(value.shape[: kind.leading]) == self.count

    def operand(self, node: fx.Node, place: int = 0) -> tuple[Kind, Tensor]:
        """Return the kind and the value of one argument that is a tensor."""
        item: Any = node.args[place]
        return self.kinds[item], item.meta["val"]


def _is_all_tensors(node: fx.Node) -> bool:
    """Return whether a node reads tensors only: a symbolic size would have to be counted anew for some rows."""
    return all(tensors_in(item.meta.get("val")) for item in node.all_input_nodes)


def _follow_shaped(reader: _Reader, node: fx.Node) -> Kind | None:
    kind, value = reader.operand(node)
    found = node.meta["val"]
    if kind.name != "rows":
        return None
    after = reader.leading_of(found)
    if schema_of(node.target).name in ("aten::expand", "aten::slice_backward"):
        is_within = found.ndim == value.ndim and value.shape[: kind.leading] == found.shape[: kind.leading]
        return kind if is_within and after == kind else None
    rest, before = (math.prod(each.shape[k.leading :]) for each, k in ((found, after or kind), (value, kind)))
    return after if rest == before else None


def _follow_joined(reader: _Reader, node: fx.Node) -> Kind | None:
    kinds, value = {reader.kinds[item] for item in node.all_input_nodes}, node.meta["val"]
    place = (node.args[1] if len(node.args) > 1 else 0) % value.ndim  # pyright: ignore
    (kind,) = kinds if len(kinds) == 1 else (OTHER,)
    return kind if kind.name == "rows" and place >= kind.leading else None


def _follow_transposed(reader: _Reader, node: fx.Node) -> Kind | None:
    kind, value = reader.operand(node)
    if schema_of(node.target).name == "aten::permute":
        order = [place % value.ndim for place in node.args[1]]  # pyright: ignore
        if kind.name == "rows" and order[: kind.leading] == list(range(kind.leading)):
            return kind
        is_flipped = order == [1, 0]
    elif schema_of(node.target).name == "aten::transpose":
        is_flipped = {place % value.ndim for place in node.args[1:]} == {0, 1}  # pyright: ignore
    else:
        is_flipped = True
    if value.ndim != 2 or not is_flipped:
        return None
    return COLUMNS if kind == Kind("rows", 1) else Kind("rows", 1) if kind == COLUMNS else None


def _follow_product(reader: _Reader, node: fx.Node) -> Kind | None:
    if node.target not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        return None
    first = len(node.args) - 2
    (left, _), (right, _) = reader.operand(node, first), reader.operand(node, first + 1)
    if first and (
        left != Kind("rows", 1) or reader.operand(node)[1].ndim > 1 or reader.operand(node)[0] != WHOLE
    ):
        return None  # a bias is added to each row once
    if (left, right) == (Kind("rows", 1), WHOLE):
        return left
    if (left, right) == (WHOLE, COLUMNS):
        return COLUMNS
    return SUM if (left, right) == (COLUMNS, Kind("rows", 1)) else None


def _follow_along(reader: _Reader, node: fx.Node) -> Any:
    """Follow an op along dimensions: within rows, or a sum over all of them."""
    kind, value = reader.operand(node)
    name = schema_of(node.target).name.partition("::")[2]
    if kind.name != "rows":
        return None
    place = ALONG[name]
    given: Any = node.args[place] if len(node.args) > place else 0 if name not in REDUCING else None
    given = list(range(value.ndim)) if given is None or given == [] else given
    listed: list[int] = list(given) if isinstance(given, list | tuple) else [given]  # pyright: ignore
    places = {item % value.ndim for item in listed}
    if all(item >= kind.leading for item in places):
        found = node.meta["val"]
        return kind if isinstance(found, Tensor) else [kind] * len(found)
    return SUM if name == "sum" and places.issuperset(range(kind.leading)) else None


RULES: dict[str, Callable[[_Reader, fx.Node], Any]] = {
    **dict.fromkeys(SHAPED, _follow_shaped),
    **dict.fromkeys(("t", "transpose", "permute"), _follow_transposed),
    **dict.fromkeys(("mm", "addmm"), _follow_product),
    "cat": _follow_joined,
    **dict.fromkeys(ALONG, _follow_along),
}


def is_shaped(node: fx.Node) -> bool:
    """Return whether the second argument of `node` is the shape of its result."""
    op = op_of(node)
    return op is not None and schema_of(op).name.partition("::")[2] in SHAPED
