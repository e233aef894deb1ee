"""Figures that every form of the report shows, computed from the records alone."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

from fxopt.report.records import MODEL_REGION, Fallback, GraphRecord, MismatchRecord, NodeRecord, Report, Work
from fxopt.report.units import plural


@dataclasses.dataclass(frozen=True)
class LayerFigures:
    """What one capture runs per layer.

    How many ops compute into memory of their own in a forward pass, and the bytes they write; and of a whole training
    pass what it launches and saves, None where that is not known.
    """

    region: str
    title: str
    capture: int
    layers: int
    ops_before: int
    ops_after: int
    bytes_before: int
    bytes_after: int
    work_before: Work | None
    work_after: Work | None

    @property
    def name(self) -> str:
        """How texts call the capture."""
        return f"{self.title}, capture {self.capture}"

    @property
    def kernels(self) -> tuple[int, int] | None:
        """How many kernels a training pass launches before and after, None where one is not known."""
        if self.work_before is None or self.work_after is None:
            return None
        works = (self.work_before, self.work_after)
        first, second = (work.forward_kernels + work.backward_kernels for work in works)
        return first, second

    @property
    def saved(self) -> tuple[int, int] | None:
        """The bytes that a forward pass saves before and after, None where one is not known."""
        if self.work_before is None or self.work_after is None:
            return None
        return self.work_before.saved_bytes, self.work_after.saved_bytes


def layer_figures(report: Report) -> tuple[LayerFigures, ...]:
    """Return the figures of each capture that has node records, in the report's order."""
    return tuple(
        _figures_of(graph, region_title(report, graph.region))
        for graph in report.graphs
        if graph.nodes_before
    )


def region_title(report: Report, region: str) -> str:
    """Return how a reader is told of a captured region: the path of its blocks, or what follows all blocks.

    >>> region_title(Report("Tiny"), MODEL_REGION), region_title(Report("Tiny"), "model.layers")
    ('the model', 'model.layers')
    """
    if region not in ("", MODEL_REGION):
        return region
    has_blocks = any(other.kind == "block" for other in report.regions)
    if not has_blocks:
        return "the model"
    return "the tail" if region == MODEL_REGION else "the blocks"


def count_elsewhere(report: Report) -> tuple[tuple[tuple[str, str], int], ...]:
    """Return each pattern and op of the rewrites at no site, and how many these are in all layers."""
    counts: Counter[tuple[str, str]] = Counter()
    for rewrite in report.elsewhere:
        counts[rewrite.pattern, rewrite.op] += rewrite.count
    return tuple(counts.items())


def num_elsewhere(report: Report) -> int:
    """Return how many rewrites at no site there are in all layers."""
    return sum(rewrite.count for rewrite in report.elsewhere)


def caller_of(fallback: Fallback) -> str:
    """Return how a reader is told of what ran stock: the path of its blocks, or the model."""
    return "the model" if fallback.region == MODEL_REGION else fallback.region or "the blocks"


def _figures_of(graph: GraphRecord, title: str) -> LayerFigures:
    before, after = graph.nodes_before, graph.nodes_after
    ops = (_count_ops(before), _count_ops(after))
    sizes = (_sum_bytes(before), _sum_bytes(after))
    return LayerFigures(
        graph.region, title, graph.capture, graph.layers, *ops, *sizes, graph.work_before, graph.work_after
    )


def _count_ops(nodes: Sequence[NodeRecord]) -> int:
    return sum(node.kind == "op" for node in nodes)


def _sum_bytes(nodes: Sequence[NodeRecord]) -> int:
    return sum(node.bytes for node in nodes if node.kind == "op")


def unseen_regions(report: Report) -> list[str]:
    """Return what of the model no capture served, "3 of 28 blocks at layers.0" say: its sites are counted nowhere."""
    told: list[str] = []
    for region in report.regions:
        if region.unseen and region.kind == "block":
            told.append(f"{region.unseen} of {plural(region.count, 'block')} at {region.module}")
        elif region.unseen:
            told.append(region_title(report, MODEL_REGION))
    return told


def distinct_graphs(report: Report) -> tuple[GraphRecord, ...]:
    """Return the graphs to show: of captures of one region with the same text before and after, the first.

    Its `layers` are those of all of them together.
    """
    found: dict[tuple[str, str, str], GraphRecord] = {}
    for graph in report.graphs:
        key = (graph.region, graph.before, graph.after)
        known = found.get(key)
        found[key] = (
            graph if known is None else dataclasses.replace(known, layers=known.layers + graph.layers)
        )
    return tuple(found.values())


def distinct_misses(misses: Sequence[MismatchRecord]) -> list[MismatchRecord]:
    """Return the first of those that tell the same, as captures of equal layers do."""
    distinct = {(miss.anchor, miss.module, miss.location, miss.reason): miss for miss in reversed(misses)}
    return list(reversed(distinct.values()))


def render_code(report: Report) -> str:
    """Return the graphs of `report` as one Python source; functions of the same name are numbered."""
    counts: dict[str, int] = {}
    parts: list[str] = []
    for graph in distinct_graphs(report):
        name = re.search(r"^def (\w+)\(", graph.code, re.MULTILINE)
        if name is None:
            continue
        counts[name[1]] = counts.get(name[1], 0) + 1
        number = counts[name[1]]
        code = (
            graph.code
            if number == 1
            else graph.code.replace(f"def {name[1]}(", f"def {name[1]}_{number}(", 1)
        )
        imports, _, body = code.partition("\n\n\n")
        layers = f", {graph.layers} layers" if graph.layers > 1 else ""
        parts.append(
            f"{imports}\n\n\n# {region_title(report, graph.region)}, capture {graph.capture}{layers}\n{body}"
        )
    return "\n\n".join(parts)
