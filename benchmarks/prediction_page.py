"""The page on predictions, made of the results that are kept: every row, also those that missed.

    python -m benchmarks.prediction_page          # writes docs/predictions.md

Of `benchmarks/results/` it reads `predictions_*.json` (by `benchmarks.predictions`), `budgets_*.json` (by
`benchmarks.budgets`), and of `training_*.json` the rows that have a floor (by `benchmarks.floors`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import budgets, floors

ROOT = Path(__file__).parent.parent
SHORT_TOKENS = 1024
"""Steps of fewer tokens have a table of their own."""
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "predictions.md"


def off(row: dict[str, Any], figure: str) -> float | None:
    """Return by how much of the prediction the measured figure is above it, None where there is none."""
    predicted, measured = row.get("predicted", {}), row.get("measured", {})
    if figure not in predicted or figure not in measured:
        return None
    return float(measured[figure] / predicted[figure] - 1)


def split_rows(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of at least `SHORT_TOKENS` tokens, and the others."""
    long = [row for row in rows if row["tokens"] >= SHORT_TOKENS]
    return long, [row for row in rows if row["tokens"] < SHORT_TOKENS]


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many rows came true within which share."""
    found: dict[str, Any] = {"rows": len(rows)}
    errors = [row["measured"]["error"] for row in rows if "error" in row.get("measured", {})]
    found["failed"] = len(errors)
    for figure in ("peak_bytes", "step_ms"):
        shares = sorted(abs(share) for row in rows if (share := off(row, figure)) is not None)
        if shares:
            within = {f"within {at:.0%}": sum(s <= at for s in shares) for at in (0.03, 0.08, 0.1)}
            found[figure] = {"measured": len(shares), **within, "worst": round(shares[-1], 4)}
    limits = [
        row["measured"]["peak_bytes"] / row["predicted"]["limit_bytes"] - 1
        for row in rows
        if "peak_bytes" in row.get("measured", {}) and row["predicted"]["limit_bytes"] is not None
    ]
    if limits:
        found["most above the budget"] = round(max(limits), 4)
        found["above the budget by more than 2 %"] = sum(limit > 0.02 for limit in limits)
    return found


def render_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of all rows, and of what they come to."""
    has_floor = any("floor" in row.get("measured", {}) for row in rows)
    names = ["model", "mode", "tokens", "budget", "limit GiB"]
    names += ["peak GiB predicted", "measured", "ratio", "ms predicted", "measured", "ratio"]
    names += ["over the floor"] * has_floor
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        predicted, measured = row.get("predicted", {}), row.get("measured", {})
        limit = predicted.get("limit_bytes")
        cells = [row["model"], row["mode"], str(row["tokens"]), row["budget"]]
        cells.append("-" if limit is None else f"{limit / 2**30:.2f}")
        for figure, unit, digits in (("peak_bytes", 2**30, 2), ("step_ms", 1.0, 1)):
            cells += [
                f"{found[figure] / unit:.{digits}f}" if figure in found else "-"
                for found in (predicted, measured)
            ]
            share = off(row, figure)
            cells.append("-" if share is None else f"{1 + share:.3f}")
        if has_floor:
            is_there = "floor" in measured and "step_ms" in measured
            cells.append(f"{measured['step_ms'] / measured['floor']['ms']:.2f}" if is_there else "-")
        if "error" in measured:
            cells[-1] = "failed: " + measured["error"].splitlines()[0][:80].replace("|", "/")
        lines.append("| " + " | ".join(cells) + " |")
    summary = summarize(rows)
    lines += [
        "",
        "| figure | rows | within 3 % | within 8 % | within 10 % | furthest off |",
        "|" + "---|" * 6,
    ]
    for figure, name in (("peak_bytes", "peak"), ("step_ms", "time")):
        known = summary.get(figure)
        if known is not None:
            counts = " | ".join(str(known[f"within {share}"]) for share in ("3%", "8%", "10%"))
            lines.append(f"| {name} | {known['measured']} | {counts} | {known['worst']:.1%} |")
    if "most above the budget" in summary:
        above, most = summary["above the budget by more than 2 %"], summary["most above the budget"]
        lines += [
            "",
            f"Above the budget by more than 2 %: {above} rows; the furthest is {most:+.1%} from it.",
        ]
    lines += ["", f"Failed: {summary['failed']} rows."] * bool(summary["failed"])
    return lines


def render_plans(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the tables of all rows: short ones have one of their own."""
    long, short = split_rows(rows)
    if not short:
        return render_rows(long)
    return [
        *render_rows(long),
        "",
        "### Steps that the host sets the time of",
        "",
        "Few tokens keep a GPU busy for less than the host takes to launch a step of four layers. Hosts differ",
        "by a factor of two, and one host's steps by a third from process to process: such times are not",
        "predicted well.",
        "",
        *render_rows(short),
    ]


def render_machine(result: dict[str, Any]) -> str:
    """Return on what, with what and at which commit a result was measured, and what is known of it."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['device']}, Python {machine['python']}, {versions}; at {result.get('commit', 'unknown')}."
    )


def render_page(folder: Path) -> str:
    """Return the page of all results in `folder`."""

    def read(pattern: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]

    lines = [
        "# Predictions",
        "",
        "What [plans](planning.md) say before a step runs, and what it took. This page is made from the results that",
        "are kept in `benchmarks/results/`, by `python -m benchmarks.prediction_page`; rows that miss stay in.",
        "",
        "Models have real width and random weights, and train in bf16 autocast with AdamW. Each prediction was on",
        "the disk before its plan ran. It is made from the graphs, what single ops took on this GPU, and the datasheet",
        "for the rest; what a step waits for launches, and what AdamW reaches of the memory's speed, was measured with",
        "a model that is in no table. Peaks are torch's `max_memory_allocated`, times the median",
        "of steps, ratios what was measured over what was predicted. The floor is a step's products and attention",
        "alone (`benchmarks/floors.py`). A group of rows ends when the time is up: its last ones may be missing.",
    ]
    for result in read("predictions_*.json"):
        lines += ["", "## Plans of four layers, one sequence a step", "", render_machine(result)]
        lines += ["", *render_plans(result["rows"])]
    for result in read("budgets_*.json"):
        lines += ["", "## Budgets from the smallest peak to the fastest step", "", render_machine(result)]
        lines += ["", budgets.render(result)]
    for result in read("training_*.json"):
        rows = [row for run in result["runs"] for row in run["rows"] if "over_floor" in row]
        if rows:
            lines += [
                "",
                "## Whole steps over the floor",
                "",
                f"{result['machine']}.",
                "",
                floors.render(rows),
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(render_page(RESULTS))


if __name__ == "__main__":
    main()
