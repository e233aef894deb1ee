"""Do plans come true? Peak and step time of many plans, predicted before each runs, and measured.

    python -m benchmarks.predictions --out build/predictions            # on a GPU, in 300 s
    python -m benchmarks.predictions --out build/tiny --device cpu --tiny

Three models of real width and four layers, random weights in bf16; full fine-tuning, LoRA and QLoRA; four lengths; at
each length four plans, from the smallest peak to the fastest step: "min", a third and two thirds of the way, None.
Each model and mode has a process of its own, and takes some of the sixteen, and one plan of so few tokens that the host
sets the time: such rows are summed up apart.

Of each plan the prediction is on the disk, in `<model>-<mode>.jsonl`, before the model is given it; it is made from
the graphs, what single ops took on this GPU, and for the rest the datasheet and what single products, copies and
calls of attention reached of it on an H100; of steps, what one waits for launches and what AdamW reaches of the
memory's speed, from a model that is none of these; never from a step or a block of theirs. Then some steps run in bf16
autocast with AdamW: `peak_bytes` is `torch.cuda.max_memory_allocated` over them, from the second on; the first one
compiles. `step_ms` is the median; `floor` is the step's products and attention alone (`benchmarks/floors.py`). While
one process measures, the others stand still. `phases` tell of one more step where the most was allocated.
`result.json` is kept as `benchmarks/results/predictions_<gpu>.json`, of which `python -m benchmarks.prediction_page`
makes docs/predictions.md.
On a CPU the peak is what torch's profiler saw allocated, beyond what lives all the time.
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

from benchmarks import prediction_page, stacks
from benchmarks.prediction_rows import MODELS, ROWS, run_group
from benchmarks.shapes import MODES
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
    long, short = prediction_page.split_rows(rows)
    result = {
        "machine": stacks.describe_machine(),
        "commit": given.commit,
        "tiny": given.tiny,
        "summary": prediction_page.summarize(long),
        "short": prediction_page.summarize(short),
        "rows": rows,
    }
    (given.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run all groups, or one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "predictions", help="a folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the same path with models of no size")
    parser.add_argument("--seconds", type=float, default=300.0, help="all ends after so many")
    parser.add_argument(
        "--rows", type=int, default=ROWS, help="plans of each model and mode, beside the short one"
    )
    parser.add_argument("--only", type=lambda text: text.split(","), help="modes to run, by commas")
    parser.add_argument("--at-once", type=int, default=max(1, min(9, (os.cpu_count() or 2) // 2)))
    parser.add_argument("--group", help="run this model:mode here")
    parser.add_argument("--until", type=float, default=float("inf"), help="of a group: begin no row later")
    parser.add_argument("--commit", default=stacks.find_commit(), help="what is measured")
    given = parser.parse_args(argv)
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
    print("\n".join(prediction_page.render_plans(result["rows"])))
    print(json.dumps({name: result[name] for name in ("summary", "short")}, indent=1))
    return int(any(result[name]["failed"] for name in ("summary", "short")))


if __name__ == "__main__":
    raise SystemExit(main())
