"""The graph before and the graph after as one set of cells, so that both can be drawn in the same places.

A cell holds a node of the graph before, a node of the graph after, or one of each: a node that stayed, or a node
that came and one of the stock nodes that it stands for.
"""

from __future__ import annotations

import dataclasses

from fxopt.report.records import GraphRecord, NodeRecord


@dataclasses.dataclass(frozen=True)
class Cell:
    """One place: what stands there before and after, and the pattern that changed it, "" where none did."""

    id: int
    before: NodeRecord | None
    after: NodeRecord | None
    pattern: str


@dataclasses.dataclass(frozen=True)
class Aligned:
    """The cells of one graph, and the edges before and after between them."""

    cells: tuple[Cell, ...]
    edges_before: tuple[tuple[int, int], ...]
    edges_after: tuple[tuple[int, int], ...]


def align(graph: GraphRecord) -> Aligned:
    """Return the nodes of `graph` before and after, aligned by provenance.

    >>> align(GraphRecord("block", 0, "", "", (), ())).cells
    ()
    """
    before = {node.name: node for node in graph.nodes_before}
    partner = _pair(graph.nodes_after, before)
    taken_by = _patterns_by_origin(graph.nodes_after)
    after_of = {name: node for node in graph.nodes_after if (name := partner.get(node.name)) is not None}
    pairs: list[tuple[NodeRecord | None, NodeRecord | None]] = [
        (node, after_of.get(node.name)) for node in graph.nodes_before
    ]
    pairs += [(None, node) for node in graph.nodes_after if node.name not in partner]
    cells = tuple(
        Cell(place, old, new, (new.pattern if new else "") or (taken_by.get(old.name, "") if old else ""))
        for place, (old, new) in enumerate(pairs)
    )
    places_before = {cell.before.name: cell.id for cell in cells if cell.before}
    places_after = {cell.after.name: cell.id for cell in cells if cell.after}
    return Aligned(cells, _edges(graph.nodes_before, places_before), _edges(graph.nodes_after, places_after))


def _pair(after: tuple[NodeRecord, ...], before: dict[str, NodeRecord]) -> dict[str, str]:
    """Return for nodes of the graph after the node before in whose place each stands.

    A node that stayed stands in its own; one that came, in that of the last stock node it stands for that is free.
    """
    pairs = {node.name: node.name for node in after if not node.pattern and node.name in before}
    order = {name: place for place, name in enumerate(before)}
    free = set(before) - set(pairs.values())
    for node in reversed(after):
        if node.name in pairs:
            continue
        origins = [name for name in node.origins if name in free]
        if origins:
            pairs[node.name] = max(origins, key=order.__getitem__)
            free.discard(pairs[node.name])
    return pairs


def _patterns_by_origin(after: tuple[NodeRecord, ...]) -> dict[str, str]:
    return {origin: node.pattern for node in after if node.pattern for origin in node.origins}


def _edges(nodes: tuple[NodeRecord, ...], places: dict[str, int]) -> tuple[tuple[int, int], ...]:
    edges = ((places[source], places[node.name]) for node in nodes for source in node.inputs)
    return tuple(dict.fromkeys(edges))
