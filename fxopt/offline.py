"""`fxopt plan`, `report` and `trace`: what fxopt would do to a model on a named GPU, from the model's config alone.

No weights exist: the model is built on the meta device, its blocks are captured there, and costs come from the GPU's
datasheet. A model that asks for values on the way is reported by a small one of its kind, with values.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn.utils.parametrize import register_parametrization
from transformers import PreTrainedConfig

from fxopt.capture.small_inputs import find_cause
from fxopt.coverage.row import randomize
from fxopt.coverage.shrink import shrunk
from fxopt.demo.models import build_meta_model, build_model, default_tokens, find_config
from fxopt.demo.quantized import quantize
from fxopt.errors import FxoptError, UnknownNameError
from fxopt.explaining import explain, trace
from fxopt.options import Options
from fxopt.planning import MARGIN, finish_plan
from fxopt.remat.devices import DEVICES, Device
from fxopt.remat.host import parse_host_memory
from fxopt.report.plan import Plan
from fxopt.report.records import Report
from fxopt.report.units import format_bytes
from fxopt.reporting import build_probe_report
from fxopt.surveying import options_for_plan, survey_model, surveyed

log = logging.getLogger("fxopt")
POINTS = 12
LORA_RANK = 16
Seen = TypeVar("Seen")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model by its config, on a GPU by its name, in a step of so many tokens under a budget.

    Without `seq` a sequence has the tokens of `default_tokens`. `fields` are those of the config that differ, as
    "name=value".
    """

    source: str | None
    arch: str | None
    budget: str
    batch: int
    seq: int | None
    lora: bool
    device: str
    four_bit: bool = False
    host_memory: str = "0"
    fields: tuple[str, ...] = ()


def plan_offline(setting: Setting, out: Path) -> tuple[Plan, tuple[Plan, ...]]:
    """Return the plan of `setting`, and the curve from the smallest peak to the fastest step, written to `out` too.

    Raises:
        FxoptError: a mistake in the options.
        UnknownNameError: no such device or model type.
    """
    options, device = _options_of(setting), _find_device(setting.device)
    model = _adapted(build_meta_model(config_of(setting)), setting)
    survey, ledger = survey_model(model, options, _inputs_of(setting, model), device)
    plan = finish_plan(survey, ledger)
    curve = survey.trace_curve(POINTS)
    write_csv(curve, out.with_suffix(".csv"))
    draw_curve(plan, curve, out)
    return plan, curve


def report_offline(setting: Setting) -> Report:
    """Return the report of one forward pass of `setting`, with its plan.

    Where no plan can be made unasked, a note says why, and the pass is one on small inputs; where that takes values,
    of a small model.

    Raises:
        FxoptError: a mistake in the options, or the model fails.
        UnknownNameError: no such device or model type.
    """
    options, device = _options_of(setting), _find_device(setting.device)
    config = config_of(setting)
    model = _adapted(build_meta_model(config), setting)
    try:
        with surveyed(model, options, _inputs_of(setting, model), device) as (survey, probe):
            plan = finish_plan(survey, probe.ledger)
            report = build_probe_report(probe)
            return dataclasses.replace(report, plans=(plan,), notes=(*report.notes, *_misfit(plan, device)))
    except FxoptError as error:
        if setting.budget != "auto":
            raise
        reason = error
    try:
        report, seen = explain(model), "small inputs"
    except FxoptError as error:
        adapted = functools.partial(_adapted, setting=setting)
        report, reason = _look_at_small(config, model, adapted, explain), error
        seen = "a small model of this config with random values, its layers fewer, on small inputs"
    if report is None:
        raise FxoptError(f"{reason}{_say_unset(config)}") from reason
    told = str(reason).partition("\n")[0]
    note = f"no plan was made, and all figures are those of {seen}: {told}"
    return dataclasses.replace(report, notes=(*report.notes, note))


def _say_unset(config: PreTrainedConfig) -> str:
    """Return a line that names what `config` leaves open, "" where that is nothing."""
    unset = [name for name, value in config.to_dict().items() if value is None]
    return f"\nfields that this config leaves open: {', '.join(unset)}" if unset else ""


def trace_offline(source: str | None, arch: str | None, fields: Sequence[str]) -> str:
    """Return the canonical graphs of the model's regions as Python, of a small one where its own asks for values.

    Raises:
        FxoptError: a mistake in the options, or the model fails.
    """
    config = find_config(source, arch, fields)
    model = build_meta_model(config)
    try:
        return trace(model)
    except FxoptError as error:
        code = _look_at_small(config, model, torch.nn.Module.train, trace)
        if code is None:
            raise
        told = str(error).partition("\n")[0]
    return f"# of a small model of this config with random values, its layers fewer: {told}\n{code}"


def _look_at_small(
    config: PreTrainedConfig,
    model: torch.nn.Module,
    adapted: Callable[[torch.nn.Module], torch.nn.Module],
    look: Callable[[torch.nn.Module], Seen],
) -> Seen | None:
    """Return what `look` finds in a small model with the kinds of layers that `config` has, None where it finds none.

    It finds none where `model`, of `config` itself, fails for its sizes: without values it then fails where the small
    one runs.
    """
    try:
        if find_cause(model) is not None:
            bare = adapted(build_meta_model(shrunk(config)))
            if find_cause(bare) is None:
                return None
        small = build_model(shrunk(config))
        randomize(small)
        return look(adapted(small))
    except Exception as error:  # what the model itself said is told
        log.debug("no small model: %s: %s", type(error).__name__, error)
        return None


def _misfit(plan: Plan, device: Device) -> tuple[str, ...]:
    """Return a note where no plan of the step fits on `device`."""
    there = int(device.memory_bytes * (1 - MARGIN))
    if plan.smallest_bytes <= there:
        return ()
    needed = format_bytes(plan.smallest_bytes)
    return (
        f"the step does not fit: it needs {needed} under any plan, and {device.name} has {format_bytes(there)} free",
    )


def config_of(setting: Setting) -> PreTrainedConfig:
    """Return the config that `setting` names.

    Raises:
        FxoptError: there is none, or four-bit weights are asked for without adapters.
    """
    if setting.four_bit and not setting.lora:
        raise FxoptError(
            "--4bit: four-bit weights are not trained, expected adapters beside them\nadd --lora"
        )
    return find_config(setting.source, setting.arch, setting.fields)


def _adapted(model: torch.nn.Module, setting: Setting) -> torch.nn.Module:
    """Return `model` in bfloat16 and training mode, its weights in four bits and with adapters as `setting` says.

    Adapters are in float32, as PEFT makes them, and compute in bfloat16, as under autocast.
    """
    model = model.to(torch.bfloat16).train()
    if setting.four_bit:
        model = quantize(model, torch.bfloat16)
    return _with_adapters(model) if setting.lora else model


def _inputs_of(setting: Setting, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tokens = setting.seq or default_tokens(model.config)  # pyright: ignore[reportArgumentType]
    ids = torch.zeros(setting.batch, tokens, dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": ids}


def _options_of(setting: Setting) -> Options:
    options = options_for_plan(_parse_budget(setting.budget))
    return dataclasses.replace(options, max_host_memory=parse_host_memory(setting.host_memory))


def _parse_budget(text: str) -> str | float | int | None:
    """Return a budget as the command line gives it: a plain number is a share, or bytes."""
    if text == "none":
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        return text
    return number if number <= 1 else int(number)


def _find_device(name: str) -> Device:
    found = next((device for device in DEVICES if device.name.lower() == name.lower()), None)
    if found is None:
        known = ", ".join(device.name for device in DEVICES)
        raise UnknownNameError(f"--device: unknown GPU {name!r}, expected one of {known}")
    return found


def _with_adapters(model: torch.nn.Module) -> torch.nn.Module:
    try:
        import peft
    except ImportError as error:
        raise FxoptError(f"--lora: peft is not installed ({error})\npip install peft") from error
    settings = peft.LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with next(model.parameters()).device:
        adapted: Any = peft.get_peft_model(model, settings)  # pyright: ignore[reportArgumentType]
    _compute_in_bfloat16(adapted)
    return adapted


def _compute_in_bfloat16(adapted: torch.nn.Module) -> None:
    """Let adapters, whose weights are in float32, compute as under autocast, which meta does not know."""
    classes: dict[type, type] = {}
    for layer in list(adapted.modules()):
        kind = type(layer)
        if isinstance(layer, torch.nn.Linear) and layer.weight.dtype == torch.float32:
            # unsafe: the dtype changes
            register_parametrization(layer, "weight", _InBfloat16(), unsafe=True)
            # Torch makes a class for each layer, and a block whose layers have others is captured anew.
            layer.__class__ = classes.setdefault(kind, type(layer))


class _InBfloat16(torch.nn.Module):
    """What autocast does to a weight in float32."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `weight` in bfloat16."""
        return weight.to(torch.bfloat16)


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
