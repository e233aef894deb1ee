"""`torch.compile(model, backend="fxopt", options=...)`: what the options of torch's own entry may say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt


def run_ops(options):
    """Return the ops of fxopt that one compiled call of a norm runs."""
    model = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8))
    compiled = torch.compile(model, backend="fxopt", options=options)
    x = torch.randn(4, 8, requires_grad=True)
    compiled(x)
    with torch.profiler.profile() as profile:
        out = compiled(x)
    assert torch.allclose(out, model(x), atol=1e-6)
    return {event.key for event in profile.key_averages() if event.key.startswith("fxopt::")}


def test_the_options_disable_patterns():
    assert run_ops(None) == {"fxopt::rms_norm"}
    assert run_ops({"disable": ["rms_norm"]}) == set()
    assert run_ops({"patterns": ["rope"]}) == set()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"disabled": ["rope"]}, "options: unknown name 'disabled', expected one of disable, "),
        ({"disable": ["roep"]}, "disable: unknown name 'roep', expected one of rope, "),
    ],
)
def test_an_unknown_option_is_told(options, text):
    with pytest.raises(Exception, match=text) as caught:
        run_ops(options)
    assert isinstance(caught.value.__cause__ or caught.value.inner_exception, fxopt.errors.UnknownNameError)
