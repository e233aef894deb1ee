"""A joint graph in which a block's widest part, its MLP, runs on some rows after the other: its memory is that of some.

The loop stands in the graph unrolled: copies of the part's nodes that read slices. Results are put together from the
copies' rows; sums over rows, the gradients of weights, add up in the order of the rows, in float32, so they are the
same in every run. Backward's copies read forward's copies, so what is computed again is computed for some rows too.
A product of fewer rows may round otherwise, and so does a sum of partial sums: gradients are not bit for bit those of
the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxopt.graph.edit import move_behind
from fxopt.remat.cost import Declarations
from fxopt.remat.joint import CHUNK, COPIED_META, REPLAYS
from fxopt.remat.regions import Region, find_regions
from fxopt.remat.rows import COLUMNS, SUM, Kind, Rows, is_shaped

MULTIPLE = 128
"""Chunks begin at such rows, so that all lie in memory as the first does."""
aten = torch.ops.aten


class NotDivisible(Exception):
    """A node of a region did something else to some rows than its rule says."""


def divide(graph: fx.Graph, count: int, declared: Declarations) -> dict[fx.Node, fx.Node]:
    """Make `graph` run its widest part in `count` chunks, and return what stands for each result of that part.

    Raises:
        NotDivisible: an op gave other shapes for some rows than it said it would.
    """
    found = find_regions(graph, declared)
    if found is None:
        raise NotDivisible("there is no part whose ops treat rows apart")
    regions, rows = found
    replaced: dict[fx.Node, fx.Node] = {}
    for region in regions:
        replaced |= _Division(graph, region, rows, count).run()
    graph.eliminate_dead_code()
    return replaced


class _Division:
    """Divides one region."""

    def __init__(self, graph: fx.Graph, region: Region, rows: Rows, count: int) -> None:
        self.graph, self.region, self.rows = graph, region, rows
        step = -(-rows.count // count)
        step = -(-step // MULTIPLE) * MULTIPLE if step > MULTIPLE else step
        self.spans = [(start, min(start + step, rows.count)) for start in range(0, rows.count, step)]
        self.nodes = {*region.forward, *region.backward}
        self.copies: list[dict[fx.Node, fx.Node]] = [{} for _ in self.spans]
        self.made: set[fx.Node] = set()

    def run(self) -> dict[fx.Node, fx.Node]:
        """Replace the region by copies of it, and return what stands for its results."""
        replaced: dict[fx.Node, fx.Node] = {}
        for nodes in (self.region.forward, self.region.backward):
            if nodes:
                replaced |= self._unroll(nodes)
        own = self.nodes | self.made
        for node, by in replaced.items():
            node.replace_all_uses_with(by, delete_user_cb=lambda user: user not in own)
            move_behind(by)
            self.rows.kinds[by] = self.rows.kinds[node]  # a region behind this one reads it
        for node in sorted(self.nodes, reverse=True):
            self.graph.erase_node(node)
        return replaced

    def _unroll(self, nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Insert the copies of `nodes` chunk by chunk behind the last of them; return what stands for each result."""
        results = [node for node in nodes if any(user not in self.nodes for user in node.users)]
        sums: dict[fx.Node, fx.Node] = {}
        flat: dict[fx.Node, fx.Node] = {}
        with self.graph.inserting_before(nodes[-1].next):
            for span, copies in zip(self.spans, self.copies, strict=True):
                sliced: dict[fx.Node, fx.Node] = {}
                for node in nodes:
                    copies[node] = self._copy(node, span, copies, sliced, flat)
                for node in results:
                    if self.rows.kind_of(node) == SUM:
                        sums[node] = self._add(sums.get(node), copies[node], node)
            return {node: self._finish(node, sums.get(node)) for node in results}

    def _copy(
        self,
        node: fx.Node,
        span: tuple[int, int],
        copies: dict[fx.Node, fx.Node],
        sliced: dict[fx.Node, fx.Node],
        flat: dict[fx.Node, fx.Node],
    ) -> fx.Node:
        """Return `node` for the rows of `span`."""

        def part_of(source: fx.Node) -> fx.Node:
            if source in copies:
                return copies[source]
            kind = self.rows.kind_of(source)
            if not kind.is_sliced:
                return source
            if source not in sliced:
                sliced[source] = self._slice(source, kind, span, node, flat)
            return sliced[source]

        args, kwargs = fx.map_arg((node.args, node.kwargs), part_of)
        kind = self.rows.kind_of(node)
        if is_shaped(node):
            args = (args[0], self._some(node.meta["val"], kind, span), *args[2:])
        new = self._call(node.target, args, kwargs, node)
        new.meta = {**node.meta, "val": new.meta["val"], CHUNK: node.name}
        for key in ("recompute", "ac_graph_id", "tensor_meta"):
            new.meta.pop(key, None)
        if REPLAYS in node.meta:
            new.meta[REPLAYS] = ""
        self._check(node, new, span)
        return new

    def _check(self, node: fx.Node, new: fx.Node, span: tuple[int, int]) -> None:
        values = [item.meta["val"] for item in (node, new)]
        whole, some = (
            [v] if isinstance(v, Tensor) else [t for t in v if isinstance(t, Tensor)] for v in values
        )
        for kind, value, part in zip(self.rows.kinds_of(node), whole, some, strict=True):
            expected = self._some(value, kind, span) if kind.is_sliced else list(value.shape)
            if list(part.shape) != expected:
                raise NotDivisible(
                    f"{node.target} gave {list(part.shape)} for some rows, expected {expected}"
                )

    def _some(self, value: Tensor, kind: Kind, span: tuple[int, int]) -> list[int]:
        """Return the shape of the rows of `span` of `value`."""
        count = span[1] - span[0]
        if kind == COLUMNS:
            return [value.shape[0], count]
        return [*(1 for _ in range(kind.leading - 1)), count, *value.shape[kind.leading :]]

    def _slice(
        self, source: fx.Node, kind: Kind, span: tuple[int, int], like: fx.Node, flat: dict[fx.Node, fx.Node]
    ) -> fx.Node:
        """Return the rows of `span` of what comes from outside."""
        value = source.meta["val"]
        if kind == COLUMNS:
            return self._call(aten.slice.Tensor, (source, 1, *span), {}, like)
        place = kind.leading - 1
        shape = [*(1 for _ in range(place)), self.rows.count, *value.shape[kind.leading :]]
        if source not in flat:
            flat[source] = source
            if list(value.shape) != shape:
                if not value.is_contiguous():
                    copied = self._call(
                        aten.clone.default, (source,), {"memory_format": torch.contiguous_format}, like
                    )
                    flat[source] = copied
                flat[source] = self._call(aten.view.default, (flat[source], shape), {}, like)
        return self._call(aten.slice.Tensor, (flat[source], place, *span), {}, like)

    def _add(self, before: fx.Node | None, part: fx.Node, like: fx.Node) -> fx.Node:
        """Return a sum over rows so far, in float32 at least."""
        dtype = like.meta["val"].dtype
        if dtype.is_floating_point and dtype.itemsize < 4:
            part = self._call(torch.ops.prims.convert_element_type.default, (part, torch.float32), {}, like)
        return part if before is None else self._call(aten.add.Tensor, (before, part), {}, like)

    def _finish(self, node: fx.Node, total: fx.Node | None) -> fx.Node:
        """Return what stands for a result of the region."""
        value, kind = node.meta["val"], self.rows.kind_of(node)
        if total is not None:
            same = total.meta["val"].dtype == value.dtype
            cast = torch.ops.prims.convert_element_type.default
            return total if same else self._call(cast, (total, value.dtype), {}, node)
        if not kind.is_sliced:
            raise NotDivisible(f"{node.target} is read outside, and is neither rows nor a sum of them")
        parts = [copies[node] for copies in self.copies]
        place = 1 if kind == COLUMNS else kind.leading - 1
        whole = self._call(aten.cat.default, (parts, place), {}, node)
        if whole.meta["val"].shape != value.shape:
            whole = self._call(aten.view.default, (whole, list(value.shape)), {}, node)
        return whole

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node) -> fx.Node:
        """Return a node inserted here, with its value, where the model's code says that `like` is."""
        new = self.graph.call_function(target, args, kwargs)
        new.meta = {key: like.meta[key] for key in COPIED_META if key in like.meta}
        values = fx.map_arg((args, kwargs), lambda item: item.meta["val"])
        try:
            new.meta["val"] = target(*values[0], **values[1])
        except RuntimeError as error:
            raise NotDivisible(f"{target} does not run on some rows: {error}") from error
        new.meta[CHUNK] = like.name
        self.made.add(new)
        return new
