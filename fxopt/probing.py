"""A look at a model: installed for one forward pass on small inputs, and taken off again; the model stays as it is."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator
from typing import Any

from torch import nn

from fxopt.capture.installation import Installation, Transform, slots_emptied
from fxopt.capture.lowering import run_uncompiled
from fxopt.capture.small_inputs import TOKENS, check_example_inputs, run_on_small_inputs
from fxopt.capture.torch_lowering import trace_joint
from fxopt.installing import new_installation
from fxopt.options import Options
from fxopt.planning import check_inputs, make_survey
from fxopt.remat.devices import Device
from fxopt.remat.survey import Survey
from fxopt.report.records import Report
from fxopt.reporting import build_probe_report


def report_on_small_inputs(
    model: nn.Module, options: Options, transform: Transform, example_inputs: dict[str, Any] | None
) -> Report:
    """Return the report of one forward pass of `model` with `options`, its graphs compiled by nothing."""
    check_example_inputs(example_inputs)
    with slots_emptied(model):
        probe = new_installation(model, options, transform, run_uncompiled)
        with _run(probe, model, example_inputs):
            return build_probe_report(probe)


def name_inputs(example_inputs: dict[str, Any] | None) -> str:
    """Return what a look at a model was a call on."""
    batch, length = TOKENS
    own = f"small inputs of fxopt's own ({batch} x {length} tokens)"
    return own if example_inputs is None else "the inputs given"


@contextlib.contextmanager
def surveyed_on_small_inputs(
    model: nn.Module,
    options: Options,
    transform: Transform,
    example_inputs: dict[str, Any] | None,
    device: Device | None = None,
) -> Generator[tuple[Survey, Installation]]:
    """Run the body while `model` still has what saw its joint graphs in one forward pass, for `device` or its own."""
    check_inputs(model, example_inputs)
    survey = make_survey(model, options, device)
    trace = functools.partial(trace_joint, decomposed=survey.lowering == "inductor")
    with slots_emptied(model):
        probe = Installation(model, options, transform, trace, partial=False, planner=survey)
        with _run(probe, model, example_inputs):
            yield survey, probe


@contextlib.contextmanager
def _run(probe: Installation, model: nn.Module, example_inputs: dict[str, Any] | None) -> Generator[None]:
    probe.cache.look_only(example_inputs or {})
    probe.install()
    try:
        run_on_small_inputs(model, example_inputs)
        yield
    finally:
        probe.remove()
