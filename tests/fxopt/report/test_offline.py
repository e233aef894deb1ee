"""Reports from a config alone: models that ask for values, configs that lack something, fields given over them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fxopt.coverage.shrink import shrunk
from fxopt.demo.models import build_meta_model, find_config
from fxopt.demo.quantized import quantize
from fxopt.errors import FxoptError, UnknownNameError
from fxopt.offline import Setting, _adapted, config_of, report_offline


class AskingConfig(LlamaConfig):
    """Of a model that looks at its tokens before its blocks run."""

    model_type = "asks_for_values"


class AskingForCausalLM(LlamaForCausalLM):
    """Cannot run on a device where nothing has a value."""

    config_class = AskingConfig

    def forward(self, input_ids: Any = None, labels: Any = None) -> Any:
        assert int(input_ids.max()) < self.config.vocab_size
        return super().forward(input_ids=input_ids, labels=labels)


@pytest.fixture
def asking() -> Iterator[str]:
    AutoConfig.register("asks_for_values", AskingConfig)
    AutoModelForCausalLM.register(AskingConfig, AskingForCausalLM)
    yield "asks_for_values"
    mappings: Any = (CONFIG_MAPPING, AutoModelForCausalLM._model_mapping)
    for mapping, key in zip(mappings, ("asks_for_values", AskingConfig), strict=True):
        del mapping._extra_content[key]


def setting(arch: str, *fields: str, budget: str = "auto") -> Setting:
    return Setting(None, arch, budget, 1, 64, lora=False, device="H100", fields=fields)


def test_a_model_that_asks_for_values_is_reported_by_a_small_one(asking: str) -> None:
    fields = ("num_hidden_layers=6", "hidden_size=96", "num_attention_heads=2", "intermediate_size=96")
    report = report_offline(setting(asking, *fields))
    assert report.model == "AskingForCausalLM"
    assert {site.status for site in report.sites} == {"rewritten"}
    assert {site.pattern for site in report.sites} >= {"rms_norm", "rope", "attention", "glu"}
    assert all(site.proof is not None and site.proof.device == "cpu" for site in report.sites)
    assert report.plans == ()
    assert re.search(
        r"those of a small model of this config with random values.*: model: AskingForCausalLM, without weights",
        report.notes[-1],
    )
    with pytest.raises(FxoptError, match="failed on the inputs given"):
        report_offline(setting(asking, *fields, budget="min"))


def test_adapters_train_in_float32_and_compute_in_bfloat16_as_under_autocast() -> None:
    fields = ("num_hidden_layers=4", "hidden_size=64", "num_attention_heads=4", "num_key_value_heads=2")
    more = ("intermediate_size=128", "vocab_size=256")
    adapted = dataclasses.replace(setting("llama", *fields, *more, budget="none"), lora=True)
    report = report_offline(adapted)
    assert {site.count for site in report.sites if site.pattern == "lora_linear"} == {4}
    assert [region.captures for region in report.regions if region.kind == "block"] == [2]
    (plan,) = report.plans
    kept = {
        residual.dtype for decision in plan.decisions for residual in decision.saved if residual.bytes > 4096
    }
    assert kept == {"bfloat16"}, "no float32 copy of an activation"
    model = _adapted(build_meta_model(config_of(adapted)), adapted)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.slow
def test_what_a_config_lacks_is_told_with_how_to_give_it() -> None:
    fields = (
        "num_hidden_layers=1",
        "hidden_size=64",
        "n_routed_experts=4",
        "moe_intermediate_size=32",
        "vocab_size=256",
    )
    with pytest.raises(FxoptError) as caught:
        report_offline(setting("deepseek_v2", *fields))
    assert "argument 'k' must be int" in str(caught.value)
    assert "or what it lacks as --set FIELD=VALUE" in str(caught.value)
    assert re.search(r"\nfields that this config leaves open: .*num_experts_per_tok", str(caught.value))
    report = report_offline(setting("deepseek_v2", *fields, "num_experts_per_tok=2"))
    assert {site.status for site in report.sites} == {"rewritten"}
    assert "experts" in {site.op for site in report.sites}


def test_a_model_of_one_layer_has_a_block_with_its_sites_and_a_plan() -> None:
    sizes = ("hidden_size=64", "intermediate_size=96", "num_attention_heads=2", "num_key_value_heads=2")
    report = report_offline(setting("llama", "num_hidden_layers=1", *sizes))
    assert {site.status for site in report.sites} == {"rewritten"}
    assert {site.pattern for site in report.sites} >= {"rms_norm", "rope", "attention", "glu"}
    assert [(region.kind, region.status) for region in report.regions] == [
        ("block", "captured"),
        ("model", "captured"),
    ]
    assert len(report.plans) == 1


@pytest.mark.parametrize(
    ("field", "error", "message"),
    [
        (
            "num_layer=2",
            UnknownNameError,
            "--set: unknown field 'num_layer', .* nearest are num_hidden_layers",
        ),
        ("hidden_size", FxoptError, "expected a field of the config and its value, got 'hidden_size'\ntry"),
        ("=2", FxoptError, "expected a field of the config and its value, got '=2'\ntry"),
        (
            "num_hidden_layers=-1",
            FxoptError,
            "--set: num_hidden_layers counts what llama is made of, expected at least 0, got -1\ngive another",
        ),
        ("hidden_size=wide", FxoptError, "--set: llama takes no hidden_size=wide: .*\ngive other values"),
    ],
)
def test_fields_that_are_none_are_told(field: str, error: type[FxoptError], message: str) -> None:
    with pytest.raises(error, match=message):
        find_config(None, "llama", (field,))


def test_fields_go_over_a_config() -> None:
    config: Any = find_config(
        None, "llama", ("num_hidden_layers=2", "hidden_act=relu", "attention_bias=true")
    )
    assert (config.num_hidden_layers, config.hidden_act, config.attention_bias) == (2, "relu", True)


def test_what_a_config_computes_from_a_field_follows_it() -> None:
    config: Any = find_config(None, "gemma2", ("num_hidden_layers=2",))
    assert len(config.layer_types) == 2


def test_a_small_config_keeps_all_but_sizes() -> None:
    config: Any = find_config(None, "gemma2", ("hidden_activation=gelu", "attn_logit_softcapping=30.0"))
    small: Any = shrunk(config)
    assert small.hidden_size < config.hidden_size
    assert (small.hidden_activation, small.attn_logit_softcapping) == ("gelu", 30.0)
    vision: Any = find_config(None, "gemma3", ('text_config={"final_logit_softcapping": 7.0}',))
    assert shrunk(vision).text_config.final_logit_softcapping == 7.0


def test_four_bits_have_the_same_forms_without_values_as_with() -> None:
    pytest.importorskip("bitsandbytes")

    def forms(device: str) -> dict[str, Any]:
        model = nn.Sequential(
            nn.Linear(192, 320, device=device), nn.Linear(320, 64, bias=False, device=device)
        )
        layers: Any = quantize(model.bfloat16(), torch.bfloat16)
        found: dict[str, Any] = {}
        for place, layer in enumerate(layers):
            parts = {"": layer.quant_state, "nested": layer.quant_state.state2, "layer": layer.__dict__}
            parts["weight"] = {"packed": layer.weight, "bias": layer.bias}
            for part, holder in parts.items():
                for name, value in (holder if isinstance(holder, dict) else vars(holder)).items():
                    is_tensor = isinstance(value, torch.Tensor)
                    if is_tensor or isinstance(value, int | str | torch.dtype | torch.Size | None):
                        form = (value.shape, value.dtype, value.requires_grad) if is_tensor else value
                        found[f"{place} {part} {name}"] = form
        return found

    assert forms("meta") == forms("cpu")


def test_a_negative_number_that_counts_nothing_is_a_value() -> None:
    config: Any = find_config(None, "llama", ("num_hidden_layers=2", "pad_token_id=-1"))
    assert config.pad_token_id == -1


@pytest.mark.slow
def test_what_fails_for_its_sizes_is_not_reported_by_a_small_model_that_runs() -> None:
    sizes = ("num_hidden_layers=2", "hidden_size=96", "num_attention_heads=6", "intermediate_size=96")
    with pytest.raises(FxoptError, match=r"without weights, failed on small inputs .*: The size of tensor"):
        report_offline(setting("llama", *sizes, "num_key_value_heads=4"))
