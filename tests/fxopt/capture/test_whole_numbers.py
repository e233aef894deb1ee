"""What is made of sizes alone has values on the meta device; a plan made there is that of a model with weights."""

from __future__ import annotations

import pytest
import torch
import transformers
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
        ("mistral", {"sliding_window": 8}, True),
        pytest.param("mistral", {"sliding_window": None}, False, marks=pytest.mark.slow),
        pytest.param("qwen2", {}, False, marks=pytest.mark.exhaustive),
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
        assert positions.nonzero().shape == (7, 1)
        assert torch.zeros(3, device="meta").is_meta


def test_random_and_unset_numbers_have_no_values():
    before = torch.get_rng_state()
    with WholeNumbers():
        for made in (
            torch.randint(0, 9, (3,), device="meta"),
            torch.randperm(3, device="meta"),
            torch.empty(3, dtype=torch.long, device="meta"),
        ):
            assert made.is_meta
    assert torch.equal(torch.get_rng_state(), before)


def test_a_forward_that_asks_for_an_unknown_value_is_told_about_its_masks():
    class Looks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            mask = torch.ones(x.shape[:2], device=x.device, dtype=torch.bool)
            if not torch.compiler.is_compiling():
                bool(x.sum() > 0)
            for block in self.blocks:
                x = block(x, mask)
            return x.square().mean()

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x, mask):
            return x + self.linear(x) * mask[..., None]

    with torch.device("meta"):
        report = fxopt.explain(Looks().train(), {"x": torch.empty(2, 5, 8)})
    assert sum("masks of the capture" in note for note in report.notes) == 1


def test_what_blocks_collect_does_not_stand_in_the_way():
    config = AutoConfig.for_model("mixtral", **SIZES, num_local_experts=2, output_router_logits=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        ids = torch.zeros(2, 32, dtype=torch.long)
        try:
            model(input_ids=ids, labels=ids)
        except NotImplementedError as error:  # 5.17 counts by torch.bincount
            pytest.skip(
                f"stock mixtral of transformers {transformers.__version__} cannot run without values: {error}"
            )
    report = fxopt.explain(model, {"input_ids": ids, "labels": ids})
    assert {site.pattern for site in report.sites if site.status == "rewritten"} >= {"rms_norm", "rope"}


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
