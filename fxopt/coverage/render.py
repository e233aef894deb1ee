"""`coverage.json` from the rows, and `coverage.md` from that file and those of other versions beside it."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fxopt.coverage.record import STATUSES, Row, versions

BUILT = ("captured", "blocks captured", "partly captured", "stock", "wrong", "failed")
MOST_REASONS = 60
PLACE = re.compile(r", at \S+:\d+$")
"""The line of a model at the end of a reason, left out where equal reasons of all models are counted."""
KNOWN_FORMS = ("rms_norm", "layer_norm", "rope", "glu", "linear_cross_entropy", "cross_entropy")
"""The patterns whose sites nearly every model has, in spellings without number: their share is the one to look at."""


def render_json(rows: Sequence[Row]) -> str:
    """Return the rows and the versions they rest on, cases in order of name."""
    ordered = sorted(rows, key=lambda row: (row.task != "causal-lm", row.task, row.case))
    document = {"versions": versions(), "rows": [dataclasses.asdict(row) for row in ordered]}
    return json.dumps(document, indent=1) + "\n"


def find_main(out: Path) -> tuple[Path, ...]:
    """Return the `coverage.json` beside a `coverage-<version>.json`, if there is one."""
    main = out.with_name(out.stem.rpartition("-")[0] + out.suffix)
    return (main,) if "-" in out.stem and main.exists() else ()


def render_page(document: Path) -> str:
    """Return the page of a `coverage.json`, with a summary of each `coverage-<version>.json` beside it."""
    others = sorted(document.parent.glob(f"{document.stem}-*{document.suffix}"))
    return render_markdown(
        json.loads(document.read_text()),
        {other.with_suffix(".md").name: json.loads(other.read_text()) for other in others},
    )


def render_markdown(document: dict[str, Any], others: Mapping[str, dict[str, Any]] | None = None) -> str:
    """Return the page of one `coverage.json`; `others` are those of other versions, by the names of their pages."""
    rows = [Row(**row) for row in document["rows"]]
    listed = _versions(document)
    parts = [
        "# Coverage",
        f"Written by `make coverage` ({listed}): with other versions, as those that `constraints.txt` has `make setup` "
        "install, figures may differ. Each row is a tiny model of random weights, built from its config, "
        "whose training step in fp32 on a CPU was compared with stock's: `error` is the largest relative error of "
        "the loss and of all gradients (beyond 1e-4 a float64 run decides which of the two is off, and stock's own "
        "distance to it is shown). A block that is not in one graph is captured in pieces around what hangs on values. "
        "Sites are counted over all layers, `rewritten/found`; `saved` is what one forward "
        "saves for backward, against stock's bytes.",
        "## Summary",
        _summary(rows),
        "## Sites by pattern",
        _patterns(rows),
        "## Sites left, by reason",
        _left(rows),
        "## Captured in pieces",
        _pieces(rows),
        "## Not captured, wrong or not built",
        _troubles(rows),
    ]
    for page, other in (others or {}).items():
        theirs = [Row(**row) for row in other["rows"]]
        parts += [
            f"## With transformers {other['versions']['transformers']}",
            f"The same with {_versions(other)}; [its page]({page}) has each row.",
            _summary(theirs),
            _patterns(theirs),
        ]
    for task in dict.fromkeys(row.task for row in rows):
        parts += [f"## Models: {task}", _models([row for row in rows if row.task == task])]
    return "\n\n".join(parts) + "\n"


def _versions(document: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in document["versions"].items())


def summary_line(rows: Sequence[Row]) -> str:
    """Return the figures of all rows in one line."""
    counts = collections.Counter(row.status for row in rows)
    found = sum(each["found"] for row in rows for each in row.sites.values())
    rewritten = sum(each["rewritten"] for row in rows for each in row.sites.values())
    statuses = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    return f"{len(rows)} models: {statuses}; {rewritten} of {found} sites rewritten"


def _summary(rows: Sequence[Row]) -> str:
    lines: list[list[object]] = []
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        counts = collections.Counter(row.status for row in own)
        built = sum(counts[status] for status in BUILT)
        captured = [row for row in own if row.status in ("captured", "blocks captured")]
        whole = [row for row in captured if not any(region.get("breaks") for region in row.regions)]
        shares = [f"{len(each) / built:.1%}" if built else "" for each in (captured, whole)]
        lines.append([task, len(own), built, *shares, *(counts[status] or "" for status in STATUSES)])
    return _table(["task", "types", "built", "every block captured", "each in one graph", *STATUSES], lines)


def _patterns(rows: Sequence[Row]) -> str:
    totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in rows:
        for pattern, counts in row.sites.items():
            totals[pattern].update(counts)
    listed = sorted(totals.items())
    known = [each for pattern, each in listed if pattern in KNOWN_FORMS]
    listed.append(("norms, rope, gated units and losses", sum(known, collections.Counter())))
    columns = ("found", "rewritten", "refused", "unmatched")
    lines = [
        [name, *(each[column] for column in columns), f"{each['rewritten'] / max(each['found'], 1):.1%}"]
        for name, each in listed
    ]
    return _table(["pattern", *columns, "share"], lines)


def _left(rows: Sequence[Row]) -> str:
    groups: dict[tuple[str, str], tuple[int, dict[str, str]]] = {}
    for row in rows:
        for left in row.left:
            key = (left["pattern"], PLACE.sub("", left["reason"]))
            count, where = groups.get(key, (0, {}))
            where.setdefault(row.case, left["location"])
            groups[key] = (count + left["count"], where)
    ordered = sorted(groups.items(), key=lambda item: -item[1][0])
    lines = [
        [pattern, count, len(where), reason, "; ".join(f"{c} {at}" for c, at in list(where.items())[:3])]
        for (pattern, reason), (count, where) in ordered[:MOST_REASONS]
    ]
    rest = sum(count for _, (count, _) in ordered[MOST_REASONS:])
    note = f"\n\n{rest} sites more, by rarer reasons, stand in the JSON." if rest else ""
    return _table(["pattern", "sites", "types", "nearest miss", "first seen in"], lines) + note


def _troubles(rows: Sequence[Row]) -> str:
    lines = [[row.case, row.status, row.reason] for row in rows if row.status != "captured"]
    return _table(["model", "status", "reason"], lines) if lines else "None."


def _pieces(rows: Sequence[Row]) -> str:
    lines = [
        [row.case, region["module"], region["captures"], "; ".join(region["breaks"])]
        for row in rows
        for region in row.regions
        if region.get("breaks")
    ]
    return _table(["model", "block", "captures", "where its graph breaks"], lines) if lines else "None."


def _models(rows: Sequence[Row]) -> str:
    lines: list[list[object]] = []
    for row in rows:
        sites = ", ".join(f"{name} {each['rewritten']}/{each['found']}" for name, each in row.sites.items())
        errors = [each for each in (row.loss_error, row.gradient_error) if each is not None]
        error = f"{max(errors):.1e}" if errors else ""
        if row.stock_error is not None:
            error += f" (stock {row.stock_error:.1e})"
        saved = ""
        if row.saved_bytes is not None and row.saved_bytes_stock:
            saved = f"{row.saved_bytes / row.saved_bytes_stock:.2f}"
        lines.append([row.model_type, row.status, sites, error, saved, row.captures or "", row.seconds])
    return _table(["type", "status", "sites", "error", "saved", "captures", "s"], lines)


def _table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(_cell(value) for value in row) + " |" for row in rows)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
