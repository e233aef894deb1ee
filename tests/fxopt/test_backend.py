"""`torch.compile(model, backend="fxopt", options=...)`: what the options of torch's own entry may say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import fxopt

TINY = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=256,
    use_cache=False,
)


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


def find_sites(model, dynamic, caplog):
    """Return what is told of the sites in the last graph, after steps of three lengths, each as stock's."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    caplog.clear()
    stock = copy.deepcopy(model)
    compiled = torch.compile(model, backend="fxopt", dynamic=dynamic)
    for length in (16, 24, 33):
        ids = torch.randint(1, 256, (2, length), generator=torch.Generator().manual_seed(length))
        for each in (model, stock):
            each.zero_grad()
        losses = [each(input_ids=ids, labels=ids).loss for each in (compiled, stock)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        for own, expected in zip(model.parameters(), stock.parameters(), strict=True):
            assert (own.grad - expected.grad).norm() <= 1e-4 * expected.grad.norm()
    told = [record.message for record in caplog.records if "sites in this graph" in record.message]
    return told[-1]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [pytest.param("llama", marks=pytest.mark.exhaustive), "gemma2"])
def test_dynamic_sizes_find_the_same_sites_in_one_graph(arch, caplog):
    torch.manual_seed(0)
    caplog.set_level("INFO", logger="fxopt")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **TINY)).train()
    expected = find_sites(model, None, caplog)
    told = find_sites(model, True, caplog)
    assert told == expected
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1, "one graph serves all lengths"
    assert not counters["graph_break"]
