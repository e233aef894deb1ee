"""`torch.compile(model, backend="fxopt")`: the same passes under torch's own entry."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.capture.gradients import keep_stock_gradients
from fxopt.capture.lowering import choose_lowering
from fxopt.capture.segments import compile_model_graph, find_segments
from fxopt.options import Options
from fxopt.pipeline import ALL, make_transform
from fxopt.report.records import MODEL_REGION

log = logging.getLogger("fxopt")


def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Compile one graph for `torch.compile(model, backend="fxopt")`: the same passes, torch's own entry.

    Torch does not tell a backend whether the model trains, so logits stay lazy wherever gradients are on.
    """
    options = Options(patterns=tuple(ALL))
    training = torch.is_grad_enabled()
    outcome = make_transform(options)(gm, region=MODEL_REGION, lazy_outputs=training)
    log.info("%d sites in this graph: %s", len(outcome.sites), [site.pattern for site in outcome.sites])
    lowering, reason = choose_lowering(options.lowering, gm)
    if reason:
        log.warning("%s", reason)
    lower = keep_stock_gradients(lowering, MODEL_REGION)
    return compile_model_graph(gm, example_inputs, lower, find_segments(gm))
