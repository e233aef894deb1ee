"""`fxopt.explain` and `fxopt.trace`: what fxopt did or would do to a model, and the graphs that it sees there."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from fxopt.capture.installation import check_model, check_uncompiled, find_installation
from fxopt.errors import FxoptError
from fxopt.options import Options
from fxopt.pipeline import ALL, make_transform
from fxopt.probing import name_inputs, report_on_small_inputs
from fxopt.report.figures import render_code
from fxopt.report.records import Report
from fxopt.reporting import build_report

STOCK = "the model is stock: this is what fxopt.optimize would do to it"


def explain(model: nn.Module, example_inputs: dict[str, Any] | None = None) -> Report:
    """Return the report of what fxopt did, or would do, to `model`; nothing is changed.

    On a model that has run optimized, this is what was done. Of a stock one, a copy of an optimized one too, the first
    line and a note say that it is. Where nothing was done yet, fxopt runs one forward pass in
    training mode on small inputs of its own (`input_ids` and `labels` of 2 x 16 tokens) or on
    `example_inputs`, keyword arguments of the model's forward, and a note says so; the report then counts no
    fallbacks. Works on the meta device.

    Raises:
        FxoptError: not a module, or no inputs could be made for it.

    >>> import torch, fxopt
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    >>> report = fxopt.explain(model, {"input": torch.randn(2, 4)})
    >>> report.sites
    ()
    """
    model = check_model(model)
    installation = find_installation(model)
    if installation is not None and installation.ledger.has_run and example_inputs is None:
        return build_report(installation)
    check_uncompiled(model)
    options = installation.options if installation is not None else Options(patterns=tuple(ALL))
    report = report_on_small_inputs(model, options, make_transform(options), example_inputs)
    seen = f"read from one call on {name_inputs(example_inputs)}"
    if installation is not None:
        calls = (
            "not from training calls" if installation.ledger.has_run else "for there was no training call yet"
        )
        return dataclasses.replace(report, notes=(f"{seen}, {calls}", *report.notes))
    return dataclasses.replace(report, stock=True, notes=(f"{STOCK}, {seen}", *report.notes))


def trace(model: nn.Module, example_inputs: dict[str, Any] | None = None) -> str:
    """Return the canonical graphs of `model`'s regions, which patterns match, as Python that runs.

    One function per distinct block, and `tail` for what stands after the blocks, with shapes and lines of the model's
    source. Inputs are made as by `explain`.

    Raises:
        FxoptError: not a module, no inputs could be made for it, or none of it could be captured.

    >>> import torch, fxopt
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    >>> print(fxopt.trace(model, {"input": torch.randn(2, 4)}))
    import torch
    import torch.nn.functional as F
    ...
        input_1 = F.linear(l_kwargs_input, v_0_weight, v_0_bias)  # f32[2, 4]
        # 1
        input_2 = F.relu(input_1)  # f32[2, 4]
        return (input_2,)
    <BLANKLINE>
    """
    model = check_model(model)
    check_uncompiled(model)
    options = Options(patterns=())
    report = report_on_small_inputs(model, options, make_transform(options), example_inputs)
    code = render_code(report)
    if not code:
        reasons = "; ".join(region.reason for region in report.regions if region.reason)
        raise FxoptError(
            f"trace: no graph of {report.model} was captured, expected one at least, got {reasons or 'no op'}\n"
            "print(fxopt.explain(model)) says more"
        )
    return code
