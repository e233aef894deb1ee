"""Do plans come true? Peak and step time of many plans, predicted before each runs, and measured.

    python -m benchmarks.predictions --out build/predictions            # on a GPU, in 280 s
    python -m benchmarks.predictions --out build/tiny --device cpu --tiny
    python -m benchmarks.predictions --render build/predictions/result.json --docs docs/predictions.md

Three models of real width and four layers, random weights in bf16; full fine-tuning, LoRA and QLoRA; four lengths; at
each length four plans, from the smallest peak to the fastest step: "min", a third and two thirds of the way, None.
Each model and mode has a process of its own, and takes some of the sixteen.

Of each plan the prediction is on the disk, in `<model>-<mode>.jsonl`, before the model is given it; it is made from
the graphs, what single ops took on this GPU, and for the rest the datasheet and what single products, copies and
calls of attention reached of it on an H100; never from a step or a block. Then some steps run in bf16 autocast with
AdamW: `peak_bytes` is `torch.cuda.max_memory_allocated` over them, from the second on; the first one compiles.
`step_ms` is the median. While one process measures, the others stand still. `phases` tell of one more step where the
most was allocated. On a CPU the peak is what torch's profiler saw allocated, beyond what lives all the time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import stacks
from benchmarks.prediction_rows import MODELS, MODES, ROWS, run_group
from benchmarks.turns import run_in_turns

ROOT = Path(__file__).parent.parent


def collect(out: Path) -> list[dict[str, Any]]:
    """Return the rows that the groups wrote: the predictions, each with what was measured, where anything was."""
    rows: list[dict[str, Any]] = []
    for path in sorted(out.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            kind = record.pop("kind")
            key = tuple(record.pop(name) for name in ("model", "mode", "tokens", "budget"))
            if kind == "predicted":
                names = zip(("model", "mode", "tokens", "budget"), key, strict=True)
                rows.append({**dict(names), "predicted": record})
            elif rows and tuple(rows[-1][name] for name in ("model", "mode", "tokens", "budget")) == key:
                rows[-1]["measured"] = record
            else:  # it failed before anything was predicted
                names = zip(("model", "mode", "tokens", "budget"), key, strict=True)
                rows.append({**dict(names), "measured": record})
    return rows


def off(row: dict[str, Any], figure: str) -> float | None:
    """Return by how much of the prediction the measured figure is above it, None where there is none."""
    predicted, measured = row.get("predicted", {}), row.get("measured", {})
    if figure not in predicted or figure not in measured:
        return None
    return float(measured[figure] / predicted[figure] - 1)


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


def render(result: dict[str, Any]) -> str:
    """Return a page of the documentation: the table of all rows, and what it comes to."""
    rows, machine = result["rows"], result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# Predictions",
        "",
        "Plans of models with four layers of real width and random weights, one sequence a step, bf16 autocast, AdamW.",
        "Each prediction was on the disk before its plan ran. It is made from what single ops took on this GPU,",
        "and the datasheet for the rest; no measured step or block feeds it. `python -m",
        f"benchmarks.predictions` makes this page. {machine['device']}, {versions}.",
        "",
        "| model | mode | tokens | budget | peak GiB predicted | measured | off | ms predicted | measured | off |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        predicted, measured = row.get("predicted", {}), row.get("measured", {})
        cells: list[str] = []
        for figure, unit, digits in (("peak_bytes", 2**30, 2), ("step_ms", 1.0, 1)):
            cells += [
                f"{found[figure] / unit:.{digits}f}" if figure in found else "-"
                for found in (predicted, measured)
            ]
            share = off(row, figure)
            cells.append("-" if share is None else f"{share:+.1%}")
        if "error" in measured:
            cells[-1] = "failed: " + measured["error"].splitlines()[0][:80].replace("|", "/")
        named = (row["model"], row["mode"], str(row["tokens"]), row["budget"])
        lines.append("| " + " | ".join((*named, *cells)) + " |")
    lines += [
        "",
        "| figure | rows | within 3 % | within 8 % | within 10 % | furthest off |",
        "|---|---|---|---|---|---|",
    ]
    for figure, name in (("peak_bytes", "peak"), ("step_ms", "time")):
        known = result["summary"].get(figure)
        if known is not None:
            counts = " | ".join(str(known[f"within {share}"]) for share in ("3%", "8%", "10%"))
            lines.append(f"| {name} | {known['measured']} | {counts} | {known['worst']:.1%} |")
    if "most above the budget" in result["summary"]:
        above = result["summary"]["above the budget by more than 2 %"]
        most = result["summary"]["most above the budget"]
        lines += [
            "",
            f"Above the budget by more than 2 %: {above} rows; the furthest is {most:+.1%} from it.",
        ]
    return "\n".join(lines) + "\n"


def run_all(given: argparse.Namespace) -> dict[str, Any]:
    """Run all groups and return the result, written too."""
    given.out.mkdir(parents=True, exist_ok=True)
    for old in given.out.glob("*.jsonl"):
        old.unlink()
    groups = [f"{name}:{mode}" for name in MODELS for mode in MODES if not given.only or mode in given.only]
    until = time.time() + given.seconds
    options = ["--out", str(given.out), "--device", given.device, "--rows", str(given.rows)]
    options += ["--until", str(until - 15)] + ["--tiny"] * given.tiny
    command = [sys.executable, "-m", "benchmarks.predictions", *options, "--group"]
    logs = [given.out / f"{group.replace(':', '-')}.log" for group in groups]
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # the groups compile side by side
    os.chdir(ROOT)
    run_in_turns(
        [[*command, group] for group in groups],
        logs,
        at_once=given.at_once,
        until=until,
        tell=lambda text: print(text, flush=True),
    )
    rows = collect(given.out)
    result = {
        "machine": stacks.describe_machine(),
        "tiny": given.tiny,
        "summary": summarize(rows),
        "rows": rows,
    }
    (given.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run all groups, or one of them, or write the page of a result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "predictions", help="a folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the same path with models of no size")
    parser.add_argument("--seconds", type=float, default=280.0, help="all ends after so many")
    parser.add_argument("--rows", type=int, default=ROWS, help="plans of each model and mode")
    parser.add_argument("--only", type=lambda text: text.split(","), help="modes to run, by commas")
    parser.add_argument("--at-once", type=int, default=max(1, min(9, (os.cpu_count() or 2) // 2)))
    parser.add_argument("--group", help="run this model:mode here")
    parser.add_argument("--until", type=float, default=float("inf"), help="of a group: begin no row later")
    parser.add_argument("--render", type=Path, help="write the page of this result")
    parser.add_argument("--docs", type=Path, help="where to")
    given = parser.parse_args(argv)
    if given.render is not None:
        result = json.loads(given.render.read_text())
        page = render({**result, "summary": summarize(result["rows"])})
        if given.docs is None:
            print(page)
        else:
            given.docs.write_text(page)
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.predictions: no CUDA device, expected one; --device cpu --tiny runs the same path on a CPU"
        )
        return 2
    if given.device == "cpu" and not given.tiny:
        print("benchmarks.predictions: --device cpu runs models of no size only, expected --tiny beside it")
        return 2
    if given.group is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        run_group(given)
        return 0
    result = run_all(given)
    print(render(result))
    print(json.dumps(result["summary"], indent=1))
    return int(result["summary"]["failed"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
