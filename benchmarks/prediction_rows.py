"""Plans of one model and mode: each predicted, written down, carried out and measured."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import time
import traceback
from typing import Any

import torch
from torch import nn

from benchmarks import floors
from benchmarks.meters import CpuMeter, GpuMeter
from benchmarks.shapes import MODES, build, make_batch
from benchmarks.turns import Turn

LAYERS = 4
MODELS = ("qwen2.5-7b", "llama3.2-1b", "gemma2-2b")
LENGTHS = (2048, 4096, 8192, 16384)
SHORT = 512
"""Tokens of one more row of each group, whose time the host sets: it scatters more than predictions should."""
TINY_LENGTHS, TINY_SHORT = (64, 96, 128, 160), 32
BUDGETS = ("min", "third", "two thirds", "None")
ROWS = 6
"""Plans of each model and mode beside the short one: some are left out where two of them are the same."""
WARM, TIMED = 1, 7
LEAST_S = 0.6
"""Short steps are timed for so long: a host whose share of a machine is used up stands still for a tenth of that."""


def draw(group: int, rows: int) -> list[tuple[int, int]]:
    """Return which lengths and budgets a group takes, by their numbers; all groups together take all.

    Length 4 is the short one, which comes last.

    >>> draw(0, 5)
    [(0, 0), (1, 1), (2, 2), (3, 3), (0, 1), (4, 0)]
    """
    return [*((row % 4, (row + row // 4 + group) % 4) for row in range(rows)), (4, group % 4)]


def run_group(given: argparse.Namespace) -> None:
    """Predict and measure the rows of one model and mode, each written as soon as it is known."""
    import fxopt

    turn = Turn()
    time_in_turns(turn)
    name, mode = given.group.split(":")
    number = MODELS.index(name) * len(MODES) + MODES.index(mode)
    lengths = (*TINY_LENGTHS, TINY_SHORT) if given.tiny else (*LENGTHS, SHORT)
    path = given.out / f"{name}-{mode}.jsonl"
    model = build(name, mode, given.device, tiny=given.tiny, layers=LAYERS)
    curves: dict[int, tuple[Any, ...]] = {}
    floor_of: dict[int, dict[str, Any]] = {}
    seen: list[tuple[Any, ...]] = []
    with path.open("a") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

        for place, budget in draw(number, given.rows):
            if time.time() > given.until:
                break
            row: dict[str, Any] = {
                "model": name,
                "mode": mode,
                "tokens": lengths[place],
                "budget": BUDGETS[budget],
            }
            try:
                batch = make_batch(model, lengths[place], given.device)
                if place not in curves:
                    curves[place] = plan_curve(model, batch, given.device, len(BUDGETS))
                plan = curves[place][budget]
                if (place, plan.layers, plan.decisions) in seen:
                    continue
                seen.append((place, plan.layers, plan.decisions))
                write({"kind": "predicted", **row, "at": time.time(), **describe(plan)})
                fxopt.optimize(model, plan=plan, verify="off")
                found = measure(model, batch, given.device, turn)
                if place not in floor_of:
                    work = floors.find_work(name, mode, 1, lengths[place], tiny=given.tiny, layers=LAYERS)
                    with turn:
                        floor_of[place] = floors.measure_floor(work, given.device)
                write({"kind": "measured", **row, **found, "floor": floor_of[place]})
            except Exception as error:
                traceback.print_exc()
                write({"kind": "measured", **row, "error": f"{type(error).__name__}: {error}"[:2000]})
            clean_up(model)


def time_in_turns(turn: Turn) -> None:
    """Have ops timed, as plans need, while the other processes stand still."""
    from fxopt import timing

    timer: Any = timing.OpTimer
    time_ops = timer.__call__

    def time_alone(*given: Any) -> Any:
        with turn:
            return time_ops(*given)

    timer.__call__ = time_alone


def plan_curve(
    model: nn.Module, batch: dict[str, Any], device: str, num_budgets: int, host: int | str | None = None
) -> tuple[Any, ...]:
    """Return the plans of so many budgets, from the smallest peak to the fastest step."""
    from fxopt.surveying import options_for_plan, survey_model

    with torch.autocast(device, torch.bfloat16):
        survey, _ = survey_model(model, options_for_plan(None, max_host_memory=host), batch)
    return survey.trace_curve(num_budgets)


def describe(plan: Any) -> dict[str, Any]:
    """Return what a plan predicts."""
    fields = (
        "limit_bytes",
        "peak_bytes",
        "peak_at",
        "step_ms",
        "recompute_ms",
        "static_bytes",
        "residual_bytes",
        "host_bytes",
        "measured_share",
        "rooflines",
    )
    blocks = {instant.name: instant.bytes for instant in plan.timeline}
    phases = {
        phase: max(size for name, size in blocks.items() if name.startswith(phase))
        for phase in ("forward", "backward", "optimizer")
    }
    return {
        **{name: getattr(plan, name) for name in fields},
        "phases": {**phases, "between": plan.static_bytes + plan.residual_bytes},
        "layers": [
            {"saved": decision.saved_bytes, "again_ms": decision.recompute_ms, "ms": decision.compute_ms}
            for decision in (plan.decisions[number] for _, number in plan.layers)
        ],
        "after": [{"saved": d.saved_bytes, "ms": d.compute_ms} for d in plan.after],
    }


def measure(
    model: nn.Module, batch: dict[str, Any], device: str, turn: Turn, timed: int = TIMED
) -> dict[str, Any]:
    """Return what steps of an optimized model took; `timed` of them are timed, short ones more often."""
    import fxopt

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    meter = (GpuMeter if device == "cuda" else CpuMeter)(model, optimizer)

    def forward() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return model(**batch).loss

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    start = time.perf_counter()
    step()
    meter.synchronize()
    first_s = time.perf_counter() - start
    with meter.peak() as peak:
        for _ in range(WARM):
            step()
        meter.synchronize()
        with turn:
            seconds: list[float] = []
            while len(seconds) < timed or sum(seconds) < LEAST_S:
                start = time.perf_counter()
                step()
                meter.synchronize()
                seconds.append(time.perf_counter() - start)
    phases: dict[str, int] = {}
    with meter.peak() as phase:
        loss = forward()
    phases["forward"], phases["between"] = phase.bytes, phase.left
    with meter.peak() as phase:
        loss.backward()
    phases["backward"] = phase.bytes
    with meter.peak() as phase:
        optimizer.step()
    phases["optimizer"] = phase.bytes
    optimizer.zero_grad(set_to_none=True)
    report = fxopt.explain(model)
    return {
        "at": time.time(),
        "peak_bytes": peak.bytes,
        "step_ms": statistics.median(seconds) * 1e3,
        "least_ms": min(seconds) * 1e3,
        "first_s": first_s,
        "phases": phases,
        **meter.more(),
        "fallbacks": sum(fallback.count for fallback in report.fallbacks),
        "notes": list(report.notes),
    }


def clean_up(model: nn.Module) -> None:
    """Give back what a row left, so that the next one finds the model as this one did."""
    import fxopt

    with contextlib.suppress(fxopt.FxoptError):
        fxopt.restore(model)
    model.zero_grad(set_to_none=True)
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
