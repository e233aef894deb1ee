"""`fxopt.plan`: what each block should save, from a survey of the joint graphs; nothing is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from typing import Any

from torch import nn

from fxopt.capture.installation import Installation, check_model
from fxopt.capture.ledger import Ledger
from fxopt.options import Options, check_options
from fxopt.pipeline import ALL, make_transform
from fxopt.planning import finish_plan
from fxopt.probing import surveyed_on_small_inputs
from fxopt.remat.budget import check_budget
from fxopt.remat.devices import Device
from fxopt.remat.host import check_host_memory
from fxopt.remat.survey import Survey
from fxopt.report.plan import Plan
from fxopt.rewriting.pattern import Pattern


def plan(
    model: nn.Module,
    memory_budget: int | float | str | None = "auto",
    example_inputs: dict[str, Any] | None = None,
    *,
    patterns: Iterable[Pattern | str] = ALL,
    disable: Iterable[str] = (),
    lowering: str = "auto",
    max_host_memory: int | str | None = None,
) -> Plan:
    """Return what each block of `model` should save for backward and compute again; nothing is changed or trained.

    One forward pass runs on `example_inputs`, keyword arguments of the model's forward, without saving anything:
    give them the batch and length of your training step. Works on the meta device. `print` shows the plan,
    `to_json` writes it, `fxopt.optimize(model, plan=...)` carries it out.

    Args:
        model: a `torch.nn.Module`.
        memory_budget: as `fxopt.optimize` takes it, but that "auto" is the fastest that fits what is free on a GPU.
        example_inputs: by default `input_ids` and `labels` of 2 x 16 tokens.
        patterns, disable, lowering, max_host_memory: as `fxopt.optimize` takes them: a plan holds for the graphs that
            they make.

    Raises:
        FxoptError: not a module, no inputs could be made, inputs on another device, a malformed budget or one below
            the smallest possible peak, or blocks that could not be captured.

    >>> import torch, fxopt
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    >>> fxopt.plan(model, None, {"input": torch.randn(2, 4)}).residual_bytes
    64
    """
    options = options_for_plan(
        memory_budget, lowering, patterns=patterns, disable=disable, max_host_memory=max_host_memory
    )
    return finish_plan(*survey_model(check_model(model), options, example_inputs))


def survey_model(
    model: nn.Module, options: Options, example_inputs: dict[str, Any] | None, device: Device | None = None
) -> tuple[Survey, Ledger]:
    """Return what was seen of the joint graphs of `model`, for `device` or its own, and what happened meanwhile."""
    with surveyed(model, options, example_inputs, device) as (survey, probe):
        return survey, probe.ledger


@contextlib.contextmanager
def surveyed(
    model: nn.Module, options: Options, example_inputs: dict[str, Any] | None, device: Device | None
) -> Generator[tuple[Survey, Installation]]:
    """Run the body while `model` still has what saw its joint graphs in one forward pass."""
    with surveyed_on_small_inputs(model, options, make_transform(options), example_inputs, device) as seen:
        yield seen


def options_for_plan(
    memory_budget: object,
    lowering: str = "auto",
    *,
    patterns: Iterable[Pattern | str] = ALL,
    disable: Iterable[str] = (),
    max_host_memory: int | str | None = None,
) -> Options:
    """Return the options of a plan; its rewrites are not proven, as nothing is trained."""
    return check_options(
        ALL,
        patterns=patterns,
        disable=disable,
        lowering=lowering,
        verify="off",
        strict=False,
        partial=False,
        memory_budget=check_budget(memory_budget),
        max_host_memory=check_host_memory(max_host_memory),
    )
