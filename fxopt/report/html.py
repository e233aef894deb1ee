"""A report as one self-contained HTML file: pure formatting of records.

The template stands in `assets/`, with its style, its script and dagre, which lays the graphs out in the browser.
"""

from __future__ import annotations

import functools
import html
import importlib.resources
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2

from fxopt.errors import FxoptError
from fxopt.report.alignment import align
from fxopt.report.figures import (
    caller_of,
    count_elsewhere,
    distinct_graphs,
    distinct_misses,
    layer_figures,
    num_elsewhere,
    region_title,
    unseen_regions,
)
from fxopt.report.memory import describe_budget
from fxopt.report.memory_chart import chart_of
from fxopt.report.records import GraphRecord, NodeRecord, Report
from fxopt.report.units import format_bytes, plural

NUM_COLOURS = 12
"""How many colours the style sheet has for patterns; more patterns use them again."""

FRAME_BASE = '<base href="about:srcdoc">'


def render_html(report: Report) -> str:
    """Return `report` as one HTML document that needs no network and no other file.

    >>> "Tiny &lt;b&gt;" in render_html(Report("Tiny <b>"))
    True
    """
    graphs = distinct_graphs(report)
    patterns = sorted({node.pattern for graph in graphs for node in graph.nodes_after if node.pattern})
    return _template().render(
        report=report,
        headline=_headline(report),
        elsewhere=count_elsewhere(report),
        unseen=unseen_regions(report),
        format_bytes=format_bytes,
        plural=plural,
        describe_budget=describe_budget,
        relative=_relative,
        region_title=region_title,
        caller_of=caller_of,
        figures=layer_figures(report),
        charts=[chart for plan in report.plans if (chart := chart_of(plan)) is not None],
        graphs=graphs,
        patterns=patterns,
        misses=distinct_misses(report.mismatches),
        colours={name: place % NUM_COLOURS for place, name in enumerate(patterns)},
        proofs=[
            site
            for site in (*report.sites, *report.elsewhere)
            if site.proof is not None and site.proof.device != "meta"
        ],
        data={"graphs": [_graph_data(graph) for graph in graphs], "patterns": patterns},
        style=_asset("report.css"),
        script=_asset("paper.js") + _asset("report.js"),
        dagre=_asset("dagre.min.js"),
    )


def _relative(before: float, after: float) -> str:
    """Return the change as per cent, with as many digits as tell it from nothing left.

    >>> _relative(74, 17), _relative(1000, 1), _relative(10, 10)
    ('−77 %', '−99.9 %', '0 %')
    """
    change = 100 * (after / before - 1)
    text = f"{abs(change):.1f}" if 99 < abs(change) < 100 else f"{abs(change):.0f}"
    return f"{'' if text == '0' else '−' if change < 0 else '+'}{text} %"


def _headline(report: Report) -> dict[str, int]:
    """Return the number of sites in all and of each status, of rewrites at none, and of calls that fell back."""
    counts: Counter[str] = Counter()
    for site in report.sites:
        counts[site.status] += site.count
    return {
        "total": sum(counts.values()),
        **{status: counts[status] for status in ("rewritten", "refused", "unmatched")},
        "elsewhere": num_elsewhere(report),
        "fallbacks": sum(fallback.count for fallback in report.fallbacks),
    }


def save_html(report: Report, path: str | Path) -> None:
    """Write `report` to `path` as HTML.

    Raises:
        FxoptError: the folder is missing, or the file cannot be written.
    """
    text = render_html(report)
    try:
        Path(path).write_text(text, encoding="utf-8", errors="xmlcharrefreplace")  # halves of characters
    except (OSError, TypeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise FxoptError(
            f"save_html: the file cannot be written ({reason}), expected a path in a folder that exists, "
            f"got {str(path)!r}"
        ) from None


def render_notebook(report: Report) -> str:
    """Return `report` for the output cell of a notebook: the document in a frame of its own.

    The frame has no address of its own: without a base, links within the document would lead to the notebook.
    """
    document = html.escape(render_html(report).replace("<head>", f"<head>{FRAME_BASE}", 1), quote=True)
    title = html.escape(f"fxopt report: {report.model}", quote=True)
    return (
        f'<iframe title="{title}" srcdoc="{document}" sandbox="allow-scripts" '
        'style="width:100%;height:min(900px,90vh);border:1px solid #8884"></iframe>'
    )


def _graph_data(graph: GraphRecord) -> dict[str, Any]:
    """Return what the script draws one graph from."""
    aligned = align(graph)
    cells = [
        {
            "id": cell.id,
            "pattern": cell.pattern,
            "before": _node_data(cell.before),
            "after": _node_data(cell.after),
        }
        for cell in aligned.cells
    ]
    return {"cells": cells, "before": aligned.edges_before, "after": aligned.edges_after}


def _node_data(node: NodeRecord | None) -> dict[str, Any] | None:
    if node is None:
        return None
    return {
        "name": node.name,
        "title": node.op or ("return" if node.kind == "output" else node.label),
        "kind": node.kind,
        "type": node.type,
        "bytes": format_bytes(node.bytes) if node.bytes else "",
        "module": node.module,
        "at": node.location,
        "origins": list(node.origins),
    }


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_asset("report.html.j2"))


@functools.cache
def _asset(name: str) -> str:
    return (importlib.resources.files("fxopt.report") / "assets" / name).read_text(encoding="utf-8")
