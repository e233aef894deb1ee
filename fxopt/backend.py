"""`torch.compile(model, backend="fxopt")`: the same passes under torch's own entry."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxopt.capture.gradients import keep_stock_gradients
from fxopt.capture.lowering import choose_lowering
from fxopt.capture.segments import compile_model_graph, find_segments
from fxopt.options import check_name, check_options
from fxopt.pipeline import ALL, make_transform
from fxopt.report.records import MODEL_REGION

log = logging.getLogger("fxopt")
DEFAULTS: Mapping[str, Any] = {"patterns": ALL, "disable": (), "lowering": "auto", "verify": "on"}
"""What `torch.compile`'s `options` may hold, as `fxopt.optimize` takes it."""


def backend(
    gm: fx.GraphModule, example_inputs: list[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile one graph for `torch.compile(model, backend="fxopt")`: the same passes, torch's own entry.

    Torch does not tell a backend whether the model trains, so logits stay lazy wherever gradients are on, in evaluation
    mode too. There is no report of what it did: `fxopt.explain` of such a model is that of a stock one.

    Args:
        gm, example_inputs: a graph that Dynamo captured, and what it is called with.
        options: as `torch.compile(model, backend="fxopt", options={"disable": ["rope"]})` gives them: `patterns`,
            `disable`, `lowering` and `verify` of `fxopt.optimize`.

    Raises:
        UnknownNameError: an option, or a name in one, that does not exist.
        FxoptError: a value of the wrong type.
    """
    given = options or {}
    for name in given:
        check_name("options", name, tuple(DEFAULTS))
    chosen = check_options(ALL, **{**DEFAULTS, **given}, strict=False, partial=False)
    training = torch.is_grad_enabled()
    outcome = make_transform(chosen)(gm, region=MODEL_REGION, lazy_outputs=training)
    log.info("%d sites in this graph: %s", len(outcome.sites), [site.pattern for site in outcome.sites])
    lowering, reason = choose_lowering(chosen.lowering, gm)
    if reason:
        log.warning("%s", reason)
    lower = keep_stock_gradients(lowering, MODEL_REGION)
    return compile_model_graph(gm, example_inputs, lower, find_segments(gm))
