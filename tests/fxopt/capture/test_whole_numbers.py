"""What is made of sizes alone has values on the meta device; a plan made there is that of a model with weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fxopt
from fxopt.capture import whole_numbers
from fxopt.capture.whole_numbers import WholeNumbers, on_meta

SIZES = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
)


def plan_on(device, model_type, **fields):
    config = AutoConfig.for_model(model_type, **SIZES, **fields)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config).train()
        ids = torch.zeros(2, 32, dtype=torch.long)
    return fxopt.plan(model, None, {"input_ids": ids, "labels": ids})


@pytest.mark.parametrize(
    ("model_type", "fields", "has_mask"),
    [
        ("qwen2", {}, False),
        ("mistral", {"sliding_window": 8}, True),
        ("mistral", {"sliding_window": None}, False),
    ],
)
def test_a_plan_without_weights_is_that_of_the_model_with_weights(model_type, fields, has_mask):
    real, without = plan_on("cpu", model_type, **fields), plan_on("meta", model_type, **fields)
    assert real.residual_bytes == without.residual_bytes
    assert real.peak_bytes == without.peak_bytes
    assert real.step_ms == without.step_ms
    assert ("bool" in without.to_json()) is has_mask


def test_positions_have_values_and_what_reads_a_weight_has_none():
    weight = torch.ones(8, 4, device="meta")
    with WholeNumbers():
        positions = torch.arange(8, device="meta")
        assert bool((positions.diff() == 1).all())
        moved = positions.to(device="meta", dtype=torch.float32)
        assert (moved * 2).tolist() == [2.0 * place for place in range(8)]
        assert (moved @ weight).is_meta
        assert torch.zeros(3, device="meta").is_meta


def test_what_is_too_large_has_no_values(monkeypatch):
    monkeypatch.setattr(whole_numbers, "MOST_ITEMS", 8)
    with WholeNumbers():
        positions = torch.arange(8, device="meta")
        assert not positions.is_meta
        assert (positions[:, None] <= positions).is_meta


def test_a_value_is_not_written_over_by_one_that_is_unknown():
    unknown = torch.empty(8, dtype=torch.long, device="meta")
    with WholeNumbers():
        positions = torch.arange(8, device="meta")
        with pytest.raises(NotImplementedError, match="only a part has values"):
            positions.copy_(unknown)


def test_the_form_of_a_value_keeps_what_autograd_asks():
    found = on_meta({"x": torch.ones(2, 3, requires_grad=True), "n": 3})
    assert found["x"].is_meta
    assert found["x"].requires_grad
    assert (found["x"].shape, found["n"]) == ((2, 3), 3)
