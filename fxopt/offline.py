"""`fxopt plan`: a plan for a named GPU from a model's config alone, and the curve of time over memory.

No weights exist: the model is built on the meta device, its blocks are captured there, and costs come from the GPU's
datasheet.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fxopt.demo.models import build_meta_model, default_config, load_config
from fxopt.demo.quantized import quantize_on_meta
from fxopt.errors import FxoptError, UnknownNameError
from fxopt.planning import finish_plan
from fxopt.remat.devices import DEVICES, Device
from fxopt.remat.host import parse_host_memory
from fxopt.remat.records import Plan
from fxopt.report.units import format_bytes
from fxopt.surveying import options_for_plan, survey_model

POINTS = 12
LORA_RANK = 16


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What `fxopt plan` was asked for."""

    source: str | None
    arch: str | None
    budget: str
    batch: int
    seq: int
    lora: bool
    device: str
    out: Path
    four_bit: bool = False
    host_memory: str = "0"


def plan_offline(options: PlanOptions) -> tuple[Plan, tuple[Plan, ...]]:
    """Return the plan that `options` ask for, and the curve from the smallest peak to the fastest step, written too.

    Raises:
        FxoptError: a mistake in the options.
        UnknownNameError: no such device or model type.
    """
    device = _find_device(options.device)
    wanted = options_for_plan(_parse_budget(options.budget))
    wanted = dataclasses.replace(wanted, max_host_memory=parse_host_memory(options.host_memory))
    config = default_config(options.arch) if options.arch is not None else load_config(str(options.source))
    model = build_meta_model(config).to(torch.bfloat16).train()
    if options.four_bit:
        if not options.lora:
            raise FxoptError(
                "--4bit: four-bit weights are not trained, expected adapters beside them\nadd --lora"
            )
        model = quantize_on_meta(model, torch.bfloat16)
    if options.lora:
        model = _adapt(model)
    ids = torch.zeros(options.batch, options.seq, dtype=torch.long, device="meta")
    survey, ledger = survey_model(model, wanted, {"input_ids": ids, "labels": ids}, device)
    plan = finish_plan(survey, ledger)
    curve = survey.trace_curve(POINTS)
    write_csv(curve, options.out.with_suffix(".csv"))
    draw_curve(plan, curve, options.out)
    return plan, curve


def _parse_budget(text: str) -> str | float | int | None:
    """Return a budget as the command line gives it: a plain number is a share, or bytes."""
    if text == "none":
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return number if number <= 1 else int(number)


def _find_device(name: str) -> Device:
    found = next((device for device in DEVICES if device.name.lower() == name.lower()), None)
    if found is None:
        known = ", ".join(device.name for device in DEVICES)
        raise UnknownNameError(f"--device: unknown GPU {name!r}, expected one of {known}")
    return found


def _adapt(model: torch.nn.Module) -> torch.nn.Module:
    try:
        import peft
    except ImportError as error:
        raise FxoptError(f"--lora: peft is not installed ({error})\npip install peft") from error
    settings = peft.LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        return peft.get_peft_model(model, settings)  # pyright: ignore[reportArgumentType, reportReturnType]


def write_csv(curve: Sequence[Plan], path: Path) -> None:
    """Write one line per plan: peak and saved bytes, milliseconds of a step and of recomputation."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("budget", "peak_bytes", "residual_bytes", "step_ms", "recompute_ms", "peak_at"))
        for plan in curve:
            times = (round(plan.step_ms, 3), round(plan.recompute_ms, 3))
            writer.writerow((plan.budget, plan.peak_bytes, plan.residual_bytes, *times, plan.peak_at))


def draw_curve(chosen: Plan, curve: Sequence[Plan], path: Path) -> None:
    """Draw time over peak memory into `path`, and the chosen plan on it."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([p.peak_bytes / 2**30 for p in curve], [p.step_ms for p in curve], "o-", color="tab:blue")
    axes.plot(
        [chosen.peak_bytes / 2**30],
        [chosen.step_ms],
        "D",
        color="tab:orange",
        label=f"budget {chosen.budget}",
    )
    axes.set_xlabel("predicted peak, GiB")
    axes.set_ylabel("predicted step, ms")
    axes.set_title(f"{chosen.model} on {chosen.device}, {chosen.tokens} tokens")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def render_curve(curve: Sequence[Plan]) -> str:
    """Return the curve as lines of a table."""
    rows = [f"  {'peak':>11}  {'saved':>11}  {'step':>10}  {'again':>10}"]
    rows += [
        f"  {format_bytes(plan.peak_bytes):>11}  {format_bytes(plan.residual_bytes):>11}"
        f"  {plan.step_ms:>7.1f} ms  {plan.recompute_ms:>7.1f} ms"
        for plan in curve
    ]
    return "\n".join(["From the smallest peak to the fastest step", *rows])
