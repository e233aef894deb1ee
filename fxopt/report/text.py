"""A report as text: pure formatting of records, at most `WIDTH` columns, no colours.

First what became of every site, then every "no" with its reason, the proofs, what ran, and last the
graph of each distinct block before and after, as a unified diff.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

from fxopt.report.figures import (
    caller_of,
    count_elsewhere,
    layer_figures,
    num_elsewhere,
    region_title,
    unseen_regions,
)
from fxopt.report.records import PassRecord, Proof, Report, RewriteElsewhere, Site, Status
from fxopt.report.units import format_bytes, plural

WIDTH = 100
DIFF_CONTEXT = 2
RIGHT = (1, 2, 3, 4, 5)
"""The columns of numbers in tables of figures per layer."""
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls, what turns the direction of writing around, and halves of characters, which no file holds."""
USUAL_ORACLE = "float64"
STATUSES: tuple[Status, ...] = ("rewritten", "refused", "unmatched")


def render_text(report: Report) -> str:
    """Return `report` as text of at most `WIDTH` columns, ending in a newline.

    >>> print(render_text(Report("Tiny", sites=(Site("glu", "glu", 2, "rewritten", "layers.0", "tiny.py:7"),))))
    fxopt report: Tiny
    2 of 2 sites rewritten
    <BLANKLINE>
    Sites (in a block x its equal layers)
      pattern  became  rewritten  refused  unmatched
      glu      glu     2 = 1 x 2        -          -
    <BLANKLINE>
    Fallbacks: none
    <BLANKLINE>
    """
    sections = (
        _render_headline(report),
        _render_sites(report.sites),
        _render_elsewhere(report.elsewhere),
        _render_misses(report),
        _render_smaller(report.sites),
        _render_proofs(report),
        _render_backends(report.sites),
        _render_layers(report),
        _render_regions(report),
        _render_plans(report.plans),
        _render_fallbacks(report),
        _render_list("Notes", report.notes),
        _render_passes(report),
        *_render_graphs(report),
    )
    return printable("\n\n".join("\n".join(section) for section in sections if section) + "\n")


def printable(text: str) -> str:
    """Return `text` with what would steer a terminal written out, as a name of a model may hold it.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _render_headline(report: Report) -> list[str]:
    title = f"fxopt report: {report.model}"
    if report.lowering:
        title += f", lowering {report.lowering}"
    lines = [*wrap(title), *wrap(_count_by_status(report))]
    unseen = unseen_regions(report)
    if unseen:
        lines += wrap(f"not captured, their sites are in no count: {', '.join(unseen)}")
    if report.elsewhere:
        forms = (f"{pattern} -> {op}{times(count)}" for (pattern, op), count in count_elsewhere(report))
        lines += wrap(f"{plural(num_elsewhere(report), 'rewrite')} elsewhere: {', '.join(forms)}")
    return lines


def _count_by_status(report: Report) -> str:
    stock = "the model is stock: " if report.stock else ""
    if not report.sites:
        return (
            f"{stock}no sites of the library's forms found" if report.elsewhere else f"{stock}no sites found"
        )
    total = sum(site.count for site in report.sites)
    counts = {status: _count_sites(report.sites, status) for status in STATUSES}
    rewritten = f"{counts['rewritten']} of {total} sites"
    parts = [f"{stock}fxopt.optimize would rewrite {rewritten}" if stock else f"{rewritten} rewritten"]
    parts += [f"{counts[status]} {status}" for status in STATUSES[1:] if counts[status]]
    return ", ".join(parts)


def _count_sites(sites: Iterable[Site], status: Status) -> int:
    return sum(site.count for site in sites if site.status == status)


def _render_sites(sites: Sequence[Site]) -> list[str]:
    if not sites:
        return []
    rows: list[tuple[str, ...]] = [("pattern", "became", *STATUSES)]
    for pattern in dict.fromkeys(site.pattern for site in sites):
        of_pattern = [site for site in sites if site.pattern == pattern]
        ops = ", ".join(dict.fromkeys(site.op for site in of_pattern if site.op)) or "-"
        cells = (_multiplicities([s for s in of_pattern if s.status == status]) for status in STATUSES)
        rows.append((pattern, ops, *cells))
    return ["Sites (in a block x its equal layers)", *_table(rows, right=(2, 3, 4))]


def _render_elsewhere(rewrites: Sequence[RewriteElsewhere]) -> list[str]:
    if not rewrites:
        return []
    rows: list[tuple[str, ...]] = [("pattern", "became", "rewritten", "first at")]
    for pattern, op in dict.fromkeys((rewrite.pattern, rewrite.op) for rewrite in rewrites):
        same = [rewrite for rewrite in rewrites if (rewrite.pattern, rewrite.op) == (pattern, op)]
        first = place_of(same[0].module, same[0].location).removeprefix("at ")
        rows.append((pattern, op or "-", _multiplicities(same), first))
    return ["Rewrites elsewhere (at no site, as of patterns of your own)", *_table(rows, right=(2,))]


def _multiplicities(sites: Sequence[Site | RewriteElsewhere]) -> str:
    """Return `sites` counted as "57 = 2 x 28 + 1": two sites in each of 28 equal layers, and one more."""
    if not sites:
        return "-"
    total = sum(site.count for site in sites)
    groups = sorted(Counter(site.count for site in sites).items(), reverse=True)
    if groups[0][0] == 1:
        return str(total)
    terms = (str(number) if count == 1 else f"{number} x {count}" for count, number in groups)
    return f"{total} = {' + '.join(terms)}"


def _render_misses(report: Report) -> list[str]:
    lines: list[str] = []
    for site in report.sites:
        if site.status == "rewritten":
            continue
        lines += wrap(
            f"{site.pattern}{times(site.count)} {site.status} {place_of(site.module, site.location)}", 2
        )
        lines += wrap(site.reason or "no reason was recorded", 6)
        if site.proof is not None:
            lines += wrap(f"proof: {_proof_figures(site.proof)}", 6)
    told = {(site.location, site.reason) for site in report.sites}
    for miss in report.mismatches:
        if miss.anchor:
            continue  # told with its site
        reasons = {(miss.location, miss.reason), (miss.location, f"{miss.pattern}: {miss.reason}")}
        if reasons & told:
            continue
        told |= reasons
        lines += wrap(f"{miss.pattern} did not match {place_of(miss.module, miss.location)}", 2)
        lines += wrap(miss.reason, 6)
    return ["Not rewritten", *lines] if lines else []


def _render_smaller(sites: Iterable[Site]) -> list[str]:
    lines: list[str] = []
    for site in sites:
        if site.status == "rewritten" and site.reason:
            place = place_of(site.module, site.location)
            lines += wrap(f"{site.pattern}{times(site.count)} became only {site.op} {place}", 2)
            lines += wrap(site.reason, 6)
    return ["Rewritten in part", *lines] if lines else []


def _render_proofs(report: Report) -> list[str]:
    """Return one line per pattern, dtype and device: the largest error, and stock's own beside it."""
    worst: dict[tuple[str, str, str, str], tuple[Proof, int]] = {}
    done = [site for site in report.sites if site.status == "rewritten"]
    for site in (*done, *report.elsewhere):
        if site.proof is None or site.proof.device == "meta":
            continue  # nothing is proven on meta
        key = (site.op, site.proof.dtype, site.proof.device, site.proof.oracle_dtype)
        proof, number = worst.get(key, (site.proof, 0))
        worst[key] = (max(proof, site.proof, key=lambda p: p.error), number + 1)
    if not worst:
        return []
    rows: list[tuple[str, ...]] = [("op", "dtype", "device", "sites", "error", "stock's own", "worst in")]
    for (op, dtype, device, oracle), (proof, number) in worst.items():
        figures = (f"{proof.error:.1e}", f"{proof.stock_error:.1e}", proof.worst)
        if oracle != USUAL_ORACLE:
            dtype += f" against {oracle or 'nothing'}"
        rows.append((op, dtype, device, str(number), *figures))
    return [
        f"Proofs (relative error of outputs and gradients against {USUAL_ORACLE})",
        *_table(rows, right=(3, 4, 5)),
    ]


def _proof_figures(proof: Proof) -> str:
    verdict = "passed" if proof.passed else "failed"
    text = (
        f"{verdict} in {proof.dtype} on {proof.device}: error {proof.error:.1e}, "
        f"stock's own {proof.stock_error:.1e}, worst in {proof.worst}"
    )
    if proof.oracle_dtype not in ("", USUAL_ORACLE):
        text += f", against {proof.oracle_dtype}"
    if proof.shapes:
        text += f", inputs {', '.join(proof.shapes)}"
    return f"{text}; {proof.reason}" if proof.reason else text


def _render_backends(sites: Sequence[Site]) -> list[str]:
    """Return one line per op and backend, for ops that choose while they run."""
    counts: Counter[tuple[str, str]] = Counter()
    for site in sites:
        if site.backend:
            counts[site.op, site.backend] += site.count
    if not counts:
        return []
    rows = [(op, str(count), backend) for (op, backend), count in counts.items()]
    return ["Backends", *_table([("op", "sites", "served by"), *rows], right=(1,))]


def _render_layers(report: Report) -> list[str]:
    figures = layer_figures(report)
    if not figures:
        return []
    rows: list[tuple[str, ...]] = [("region", "layers", "ops before", "after", "bytes before", "after")]
    for figure in figures:
        ops = (str(figure.ops_before), str(figure.ops_after))
        sizes = (format_bytes(figure.bytes_before), format_bytes(figure.bytes_after))
        rows.append((figure.name, str(figure.layers), *ops, *sizes))
    lines = ["Per layer, forward (ops that compute, and the bytes they write)", *_table(rows, right=RIGHT)]
    rows = [("region", "layers", "kernels before", "after", "saved before", "after")]
    for figure in figures:
        if figure.kernels is not None and figure.saved is not None:
            sizes = map(format_bytes, figure.saved)
            rows.append((figure.name, str(figure.layers), *map(str, figure.kernels), *sizes))
        else:
            rows.append((figure.name, str(figure.layers), *["not known"] * 4))
    title = "Per layer, forward and backward (kernels launched op by op, and bytes saved in between)"
    lines += ["", title, *_table(rows, right=RIGHT)]
    if any(figure.kernels is None for figure in figures):
        lines += wrap("not known: the graph does not run on tensors without storage", 2)
    return lines


def _render_regions(report: Report) -> list[str]:
    if not report.regions:
        return []
    rows: list[tuple[str, ...]] = [("kind", "module", "copies", "status", "captures", "guards")]
    reasons: list[str] = []
    for region in report.regions:
        module = region.module or "(whole model)"
        numbers = (str(region.captures), str(len(region.guards)))
        rows.append((region.kind, module, str(region.count), region.status, *numbers))
        if region.reason:
            reasons += wrap(f"{region.module or region.kind}: {region.reason}", 6)
        for broken in region.breaks:
            reasons += wrap(f"{region.module or region.kind} breaks into pieces: {broken}", 6)
    return ["Regions", *_table(rows, right=(2, 4, 5)), *reasons]


def _render_plans(plans: Sequence[object]) -> list[str]:
    """Return the plans' own tables, wrapped."""
    if not plans:
        return []
    lines = [line for plan in plans for line in str(plan).splitlines() if line]
    return ["Plans", *(wrapped for line in lines for wrapped in wrap(line, 2, keep_spaces=True))]


def _render_fallbacks(report: Report) -> list[str]:
    if not report.fallbacks:
        return ["Fallbacks: none"]
    lines = [f"Fallbacks: {sum(fallback.count for fallback in report.fallbacks)} calls ran the stock path"]
    for fallback in report.fallbacks:
        lines += wrap(f"{fallback.count} x {caller_of(fallback)}: {fallback.reason}", 2)
    return lines


def _render_list(title: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    return [title, *(line for item in items for line in wrap(item, 2, bullet="- "))]


def _render_passes(report: Report) -> list[str]:
    records = report.passes or tuple(record for graph in report.graphs for record in graph.passes)
    if not records:
        return []
    by_name: dict[str, list[PassRecord]] = {}
    for record in records:
        by_name.setdefault(record.name, []).append(record)
    rows: list[tuple[str, ...]] = [("pass", "graphs", "ms", "nodes before", "after")]
    for name, same in by_name.items():
        time_ms = f"{sum(record.time_ms for record in same):.1f}"
        nodes = (sum(record.nodes_before for record in same), sum(record.nodes_after for record in same))
        rows.append((name, str(len(same)), time_ms, *map(str, nodes)))
    return ["Passes", *_table(rows, right=(1, 2, 3, 4))]


def _render_graphs(report: Report) -> list[list[str]]:
    """Return one section per capture; captures of one region with equal diffs are shown once."""
    sections: list[list[str]] = []
    shown: dict[tuple[str, tuple[str, ...]], int] = {}
    for graph in report.graphs:
        diff = _diff(graph.before, graph.after)
        title = f"Graph of {region_title(report, graph.region)}, capture {graph.capture}"
        key = (graph.region, tuple(diff))
        if key in shown:
            sections.append(wrap(f"{title}: the same changes as capture {shown[key]}"))
            continue
        shown[key] = graph.capture
        lines = wrap(f"{title}: {plural(len(graph.rewrites), 'rewrite')}")
        for rewrite in graph.rewrites:
            attributes = ", ".join(f"{name}={value!r}" for name, value in rewrite.attributes.items())
            place = f" at {rewrite.location}" if rewrite.location else ""
            nodes = f"{len(rewrite.before)} nodes -> {len(rewrite.after)}"
            lines += wrap(f"{rewrite.pattern} -> {rewrite.op}({attributes}){place}, {nodes}", 2)
        sections.append(lines + (diff or ["  no change"]))
    return sections


def _diff(before: str, after: str) -> list[str]:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=DIFF_CONTEXT)
    rendered: list[str] = []
    for line in lines:
        if line.startswith(("---", "+++")):
            continue
        sign, code = line[0], line[1:]
        indent = " " * (len(code) - len(code.lstrip()) + 4)
        rendered += textwrap.wrap(
            code,
            WIDTH,
            initial_indent=f"  {sign}",
            subsequent_indent=f"  {sign}{indent}",
            break_on_hyphens=False,
            replace_whitespace=False,
        ) or [f"  {sign}".rstrip()]
    return rendered


def times(count: int) -> str:
    """Return " x 28" for a count of layers, "" for one."""
    return f" x {count}" if count > 1 else ""


def place_of(module: str, location: str) -> str:
    """Return "at <module> (<file>:<line>)"."""
    place = f"at {module or '(the model itself)'}"
    return f"{place} ({location})" if location else place


def _table(rows: Sequence[Sequence[str]], right: tuple[int, ...]) -> list[str]:
    """Return `rows` (the first is the header) in columns; a too wide last column wraps under itself."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines: list[str] = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines += wrap("  ".join(cells).rstrip(), 2, keep_spaces=True)
    return lines


def wrap(text: str, indent: int = 0, *, bullet: str = "", keep_spaces: bool = False) -> list[str]:
    """Return `text` in lines of at most `WIDTH` columns, continuation lines four columns further in."""
    margin = " " * indent
    lines: list[str] = []
    for number, paragraph in enumerate(text.splitlines() or [""]):
        first = margin + (bullet if number == 0 else " " * len(bullet))
        rest = margin + " " * max(len(bullet), 4)
        whole = first + paragraph
        if keep_spaces and len(whole) <= WIDTH:
            lines.append(whole)
            continue
        lines += textwrap.wrap(
            paragraph, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
        )
    return lines
