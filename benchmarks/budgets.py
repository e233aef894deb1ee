"""Ten budgets from the smallest peak to the fastest step: does more memory ever cost memory or time?

    python -m benchmarks.budgets                                                    # on a GPU, about 100 s
    python -m benchmarks.budgets --model qwen2.5-7b --mode qlora --layers 4
    python -m benchmarks.budgets --device cpu --tiny --budgets 3 --out build/tiny

One model of real width and random weights in bf16, a full fine-tune of a Llama-3.2-1B of eight layers by default. One
process plans all budgets, at equal distances of bytes, and writes each prediction before anything runs; then each
distinct plan is carried out in a process of its own. These prepare side by side, and measure one at a time while the
others stand still (`benchmarks/turns.py`). The first process also measures the floor (`benchmarks/floors.py`).

`result.json` has a row for each budget; budgets that come to the same plan share what was measured (`same_as`).
`falls` are the pairs of budgets of which the larger one measured a lower peak, or a longer step, by more than 2 %.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks import floors, stacks
from benchmarks.prediction_rows import describe, measure, plan_curve, time_in_turns
from benchmarks.shapes import MODES, SHAPES, build, make_batch
from benchmarks.turns import Turn, run_in_turns

ROOT = Path(__file__).parent.parent
NOISE = 0.02
STEPS = 21
"""Of these the median counts: more than where predictions alone are asked for, since neighbours are compared."""


def find_falls(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the pairs of rows, by their numbers, that are not in the order of their budgets, beyond the noise.

    >>> steps = [{"peak_bytes": p, "step_ms": t} for p, t in ((100, 9.0), (97, 9.1), (120, 9.3))]
    >>> [(fall["smaller"], fall["larger"], fall["figure"]) for fall in find_falls([{"measured": s} for s in steps])]
    [(0, 1, 'peak_bytes'), (0, 2, 'step_ms')]
    """
    found: list[dict[str, Any]] = []
    for (first, less), (second, more) in itertools.combinations(enumerate(rows), 2):
        for figure, sign in (("peak_bytes", -1), ("step_ms", 1)):
            before, after = (row.get("measured", {}).get(figure) for row in (less, more))
            if before is not None and after is not None and sign * (after / before - 1) > NOISE:
                change = round(after / before - 1, 4)
                found.append({"smaller": first, "larger": second, "figure": figure, "change": change})
    return found


def plan_all(given: argparse.Namespace) -> dict[str, Any]:
    """Plan each budget, write plan and prediction, measure the floor, and return what the result begins with."""
    model = build_model(given)
    batch = make_batch(model, given.length, given.device, given.batch)
    plans = plan_curve(model, batch, given.device, given.budgets, given.max_host_memory)
    rows: list[dict[str, Any]] = []
    carried: list[tuple[Any, ...]] = []
    for number, plan in enumerate(plans):
        row: dict[str, Any] = {"budget": plan.budget, "at": time.time(), "predicted": describe(plan)}
        key = plan.layers, plan.decisions
        if key in carried:
            row["same_as"] = carried.index(key)
        carried.append(key)
        (given.out / f"plan-{number}.json").write_text(plan.to_json())
        rows.append(row)
    begun = {"model": given.model, "mode": given.mode, "layers": given.layers, "batch": given.batch}
    begun |= {"length": given.length, "machine": stacks.describe_machine(), "rows": rows}
    (given.out / "predicted.json").write_text(json.dumps(begun, indent=1) + "\n")
    del model
    shape = given.model, given.mode, given.batch, given.length
    work = floors.find_work(*shape, tiny=given.tiny, layers=given.layers)
    return {**begun, "floor": floors.measure_floor(work, given.device)}


def build_model(given: argparse.Namespace) -> Any:
    """Return the model that the arguments name."""
    return build(
        given.model, given.mode, given.device, tiny=given.tiny, layers=given.layers, length=given.length
    )


def measure_one(given: argparse.Namespace) -> None:
    """Carry out the plan of one budget in this process, and write what it took."""
    import fxopt

    try:
        turn = Turn()
        time_in_turns(turn)
        model = build_model(given)
        batch = make_batch(model, given.length, given.device, given.batch)
        plan = fxopt.Plan.from_json((given.out / f"plan-{given.number}.json").read_text())
        host = {} if given.max_host_memory is None else {"max_host_memory": given.max_host_memory}
        fxopt.optimize(model, plan=plan, verify="off", **host)
        found = measure(model, batch, given.device, turn, timed=given.steps)
    except Exception as error:  # it is a row of the result
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"[:2000]}
    (given.out / f"measured-{given.number}.json").write_text(json.dumps(found) + "\n")


def run_all(given: argparse.Namespace) -> dict[str, Any]:
    """Plan, run every distinct plan, and return the result, written too."""
    given.out.mkdir(parents=True, exist_ok=True)
    for old in (*given.out.glob("plan-*.json"), *given.out.glob("measured-*.json")):
        old.unlink()
    until = time.time() + given.seconds
    result = plan_all(given)
    rows = result["rows"]
    distinct = [number for number, row in enumerate(rows) if "same_as" not in row]
    names = ("model", "mode", "device", "layers", "batch", "length", "steps")
    options = [f"--{name}={getattr(given, name)}" for name in names]
    options += [f"--out={given.out.resolve()}", *["--tiny"] * given.tiny]
    options += [] if given.max_host_memory is None else [f"--max-host-memory={given.max_host_memory}"]
    command = [sys.executable, "-m", "benchmarks.budgets", *options]
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # the processes compile side by side
    os.chdir(ROOT)
    run_in_turns(
        [[*command, f"--number={number}"] for number in distinct],
        [given.out.resolve() / f"{number}.log" for number in distinct],
        at_once=given.at_once,
        until=until,
        tell=lambda text: print(text, flush=True),
    )
    for number, row in enumerate(rows):
        path = given.out / f"measured-{row.get('same_as', number)}.json"
        row["measured"] = (
            json.loads(path.read_text()) if path.exists() else {"error": "it did not end in time"}
        )
    result |= {"commit": given.commit, "tiny": given.tiny, "falls": find_falls(rows)}
    (given.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def render(result: dict[str, Any]) -> str:
    """Return the rows as a table in Markdown, and which pairs of them are out of order."""
    shape = f"{result['model']}, {result['mode']}, {result['layers']} layers, {result['batch']} x {result['length']}"
    floor = result["floor"]["ms"]
    lines = [
        f"{shape} tokens. The floor, its products and attention alone: {floor:.1f} ms.",
        "",
        "| # | limit GiB | peak GiB predicted | measured | ratio | ms predicted | measured | ratio | over the floor |",
        "|" + "---|" * 9,
    ]
    for number, row in enumerate(result["rows"]):
        predicted, measured = row["predicted"], row["measured"]
        limit = predicted["limit_bytes"]
        cells = [str(number), "-" if limit is None else f"{limit / 2**30:.2f}"]
        for figure, unit, digits in (("peak_bytes", 2**30, 2), ("step_ms", 1.0, 1)):
            cells.append(f"{predicted[figure] / unit:.{digits}f}")
            is_there = figure in measured
            cells.append(f"{measured[figure] / unit:.{digits}f}" if is_there else "failed")
            cells.append(f"{measured[figure] / predicted[figure]:.3f}" if is_there else "-")
        cells.append(f"{measured['step_ms'] / floor:.2f}" if "step_ms" in measured else "-")
        lines.append("| " + " | ".join(cells) + " |")
    names = {"peak_bytes": "peak", "step_ms": "step"}
    falls = [
        f"#{fall['larger']} over #{fall['smaller']}, {names[fall['figure']]} {fall['change']:+.1%}"
        for fall in result["falls"]
    ]
    failed = [f"#{number}" for number, row in enumerate(result["rows"]) if "error" in row["measured"]]
    lines += ["", f"Out of order by more than {NOISE:.0%}: {'; '.join(falls) or 'none'}."]
    lines += [f"Not measured: {', '.join(failed)}."] * bool(failed)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run all budgets, or carry out the plan of one; 1 where a row failed or a pair is out of order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="llama3.2-1b")
    parser.add_argument("--mode", choices=MODES, default="full")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--budgets", type=int, default=10)
    parser.add_argument("--steps", type=int, default=STEPS, help="timed of each plan")
    parser.add_argument(
        "--max-host-memory", help="as fxopt.plan takes it, 0 for none; by default its own choice"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of no size")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "budgets", help="a folder")
    parser.add_argument("--seconds", type=float, default=150.0, help="all ends after so many")
    parser.add_argument("--at-once", type=int, default=max(1, min(5, (os.cpu_count() or 2) // 3)))
    parser.add_argument("--commit", default=stacks.find_commit(), help="what is measured")
    parser.add_argument("--number", type=int, help="carry out this plan here")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.budgets: no CUDA device, expected one; --device cpu --tiny runs the same path on a CPU"
        )
        return 2
    if given.number is not None:
        measure_one(given)
        return 0
    result = run_all(given)
    print(render(result))
    return int(bool(result["falls"]) or any("error" in row["measured"] for row in result["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
