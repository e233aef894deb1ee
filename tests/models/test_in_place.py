"""Under Inductor the backward of a gated unit writes over what nobody reads any more, and a plan counts on it."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt.capture import torch_lowering
from fxopt.kernels.lora_linear import gated
from fxopt.remat import joint
from tests.models.test_chunks import batch_of, make, plan_of


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_forms_in_place_stand_and_lower_the_peak_that_is_planned(adapted, tools, monkeypatch):
    # What comes from a cache runs no pass.
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    monkeypatch.setattr(gated, "_suits", lambda *_: True)  # as with wide values in 16 bits
    forms: list[str] = []
    run = torch_lowering.write_in_place

    def write_and_note(graph):
        count = run(graph)
        names = [str(node.target) for node in graph.nodes if "_over_" in str(node.target)]
        assert len(names) == count
        forms.extend(names)
        return count

    monkeypatch.setattr(torch_lowering, "write_in_place", write_and_note)
    batch = batch_of(tools)
    gradients, peaks = [], []
    for budget in (None, "min"):
        model = make(tools, "llama", adapted=adapted)
        fxopt.optimize(model, memory_budget=budget, lowering="inductor")
        gradients.append(tools.run_step(model, batch).gradients)
        peaks.append(plan_of(model).peak_bytes)
    name = "glu_layers_backward_over_unit" if adapted else "_over_all"
    assert any(name in form for form in forms)
    assert any("_over_dy" in form for form in forms)
    for name, gradient in gradients[0].items():
        assert tools.relative(gradients[1][name], gradient) < 1e-5, name
    monkeypatch.setattr(joint, "_overwritings", lambda *_: ())
    model = make(tools, "llama", adapted=adapted)
    for budget, peak in zip((None, "min"), peaks, strict=True):
        assert peak < fxopt.plan(model, budget, batch, lowering="inductor").peak_bytes
