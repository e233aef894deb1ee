"""Tiny models of Hugging Face, one layer and the loss: what the patterns find in their captured graphs."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fxopt.graph.verify import verify
from fxopt.patterns import ACTIVATION, ALL, LINEAR_CROSS_ENTROPY
from fxopt.rewriting.near_miss import find_nearest_miss
from fxopt.rewriting.proof import Prover
from fxopt.rewriting.rewrite import MatchContext, RewriteResult, apply_patterns

BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "use_cache": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
MAMBA = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_heads": 8,
    "head_dim": 16,
    "n_groups": 2,
    "state_size": 16,
    "chunk_size": 8,
    "use_cache": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
T5 = {
    "vocab_size": 97,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 1,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "use_cache": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba2": MAMBA,
    "t5": T5,
    "gpt_oss": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"]},
    "gemma2": {**BASE, "layer_types": ["full_attention"]},
    "opt": {**BASE, "ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
}
EXPECTED: dict[str, dict[str, int]] = {
    "llama": {
        "rms_norm": 3,
        "add_rms_norm": 2,
        "rope": 1,
        "attention": 1,
        "glu": 1,
        "linear_cross_entropy": 1,
    },
    "qwen2": {
        "rms_norm": 3,
        "add_rms_norm": 2,
        "rope": 1,
        "attention": 1,
        "glu": 1,
        "linear_cross_entropy": 1,
    },
    "qwen3": {
        "rms_norm": 5,
        "add_rms_norm": 2,
        "rope": 1,
        "norm_rope": 1,
        "attention": 1,
        "glu": 1,
        "linear_cross_entropy": 1,
    },
    "gemma2": {
        "rms_norm": 5,
        "add_rms_norm": 2,
        "rope": 1,
        "attention": 1,
        "glu": 1,
        "linear_cross_entropy": 1,
    },
    "olmo2": {
        "rms_norm": 5,
        "add_rms_norm": 1,
        "rope": 1,
        "norm_rope": 1,
        "attention": 1,
        "glu": 1,
        "linear_cross_entropy": 1,
    },
    "cohere": {
        "rms_norm": 2,
        "add_rms_norm": 1,
        "rope": 1,
        "attention": 1,
        "glu": 1,
        "linear_cross_entropy": 1,
    },
    "glm4": {
        "rms_norm": 5,
        "add_rms_norm": 2,
        "rope": 1,
        "attention": 1,
        "glu": 1,
        "linear_cross_entropy": 1,
    },
    "granite": {
        "rms_norm": 3,
        "add_rms_norm": 2,
        "rope": 1,
        "attention": 1,
        "glu": 1,
        "linear_cross_entropy": 1,
    },
    "phi3": {
        "rms_norm": 3,
        "add_rms_norm": 2,
        "rope": 1,
        "attention": 1,
        "glu": 1,
        "linear_cross_entropy": 1,
    },
    "gpt_neox": {"layer_norm": 3, "rope": 1, "attention": 1, "activation": 1, "linear_cross_entropy": 1},
    "nanochat": {
        "rms_norm": 6,
        "add_rms_norm": 2,
        "rope": 1,
        "attention": 1,
        "activation": 1,
        "linear_cross_entropy": 1,
    },
    "stablelm": {"layer_norm": 3, "rope": 1, "attention": 1, "glu": 1, "linear_cross_entropy": 1},
    "gpt_oss": {
        "rms_norm": 3,
        "add_rms_norm": 2,
        "rope": 1,
        "attention": 1,
        "route": 1,
        "glu": 1,
        "experts": 1,
        "linear_cross_entropy": 1,
    },
    "mamba2": {"rms_norm": 3, "add_rms_norm": 1, "linear_cross_entropy": 1},
    "t5": {"rms_norm": 7, "add_rms_norm": 5, "attention": 1, "glu": 2, "linear_cross_entropy": 1},
}


def make_model(name: str, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    config = CONFIG_MAPPING[name](**CONFIGS.get(name, BASE))
    if name == "t5":
        return transformers.T5ForConditionalGeneration(config).to(dtype).train()
    return AutoModelForCausalLM.from_config(config).to(dtype).train()


def make_inputs() -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 97, (2, 10))
    return {"input_ids": tokens, "labels": tokens}


def rewrite(captured: Any, patterns: Any = ALL, **options: Any) -> tuple[Any, RewriteResult]:
    gm = captured.canonical()
    context = MatchContext(**{"lazy_outputs": True, "prove": Prover().prove, **options})
    result = apply_patterns(gm, patterns, context)
    verify(gm, "rewrite")
    assert [refusal.reason for refusal in result.refused] == []
    return gm, result


def count(result: RewriteResult) -> dict[str, int]:
    return dict(collections.Counter(done.match.pattern.name for done in result.rewrites))


# transformers caches a version check that Dynamo traces through.
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


QUICK = ("llama", "qwen2", "gemma2", "olmo2", "gpt_neox", "gpt_oss", "mamba2", "t5")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EXPECTED]
)
def test_a_model_is_rewritten_at_every_site(capture: Callable[..., Any], name: str) -> None:
    captured = capture(make_model(name), (), **make_inputs())
    gm, result = rewrite(captured)
    assert count(result) == EXPECTED[name]
    captured.check_equal(gm)


def test_in_fp32_the_rewritten_model_is_the_stock_one(capture: Callable[..., Any]) -> None:
    captured = capture(make_model("llama", torch.float32), (), **make_inputs())
    gm, result = rewrite(captured)
    assert count(result) == EXPECTED["llama"]
    captured.check_equal(gm)


def test_under_autocast_operands_are_cast_as_autocast_does(capture: Callable[..., Any]) -> None:
    model = make_model("llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        captured = capture(model, (), **make_inputs())
        gm, result = rewrite(captured)
        assert count(result) == EXPECTED["llama"]
        (head,) = (done for done in result.rewrites if done.record.op == "linear_cross_entropy")
        assert sum("cast" in name for name in head.after) == 2
        (stock, _), (new, _) = captured.run(captured.stock), captured.run(gm)
    assert torch.allclose(
        stock[0], new[0], rtol=2e-4
    )  # measured 1.4e-5; over 32 draws each is up to 4.8e-5 from fp32
    assert stock[0].dtype == new[0].dtype


def test_a_number_of_items_becomes_the_denominator(capture: Callable[..., Any]) -> None:
    captured = capture(make_model("llama"), (), **make_inputs(), num_items_in_batch=torch.tensor(40))
    gm, result = rewrite(captured)
    assert count(result) == EXPECTED["llama"]
    (head,) = (done for done in result.rewrites if done.record.op == "linear_cross_entropy")
    assert head.match["denominator"] is not None
    captured.check_equal(gm)


def test_where_nothing_is_lazy_the_loss_alone_is_fused(capture: Callable[..., Any]) -> None:
    captured = capture(make_model("llama"), (), **make_inputs())
    gm, result = rewrite(captured, lazy_outputs=False)
    expected = {"rms_norm": 3, "add_rms_norm": 2, "rope": 1, "attention": 1, "glu": 1, "cross_entropy": 1}
    assert count(result) == expected
    (loss,) = (done for done in result.rewrites if done.record.op == "cross_entropy")
    before = captured.canonical()
    miss = find_nearest_miss(before, LINEAR_CROSS_ENTROPY, loss.match.nodes[-1].name, lazy_outputs=False)
    assert miss.reason == "linear is also returned, expected no reader outside (nothing is lazy here)"
    captured.check_equal(gm)


def test_kept_logits_are_marked(capture: Callable[..., Any]) -> None:
    gm, _ = rewrite(capture(make_model("gemma2"), (), **make_inputs()))
    kept = [node for node in gm.graph.nodes if node.meta.get("kept")]
    assert [node.meta["kept"] for node in kept] == ["linear_cross_entropy"] * 4
    (output,) = gm.graph.find_nodes(op="output")
    assert kept[-1] in output.all_input_nodes


def test_a_relu_alone_is_left_with_a_reason(capture: Callable[..., Any]) -> None:
    gm, result = rewrite(capture(make_model("opt").eval(), (), **make_inputs()))
    assert count(result) == {"layer_norm": 3, "attention": 1, "linear_cross_entropy": 1}
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.nn.functional.relu)
    miss = find_nearest_miss(gm, ACTIVATION, min(node.meta["origins"]))
    assert "the gradient of relu is read off its result" in miss.reason


def test_one_tensor_of_both_is_read_and_no_half_of_it(capture: Callable[..., Any]) -> None:
    patterns = [pattern for pattern in ALL if pattern.name != "experts"]  # these would take the unit over
    for name, layout in (("glm4", "packed"), ("gpt_oss", "interleaved")):
        gm, result = rewrite(capture(make_model(name), (), **make_inputs()), patterns)
        (done,) = (done for done in result.rewrites if done.record.op == "glu")
        assert done.record.attributes["layout"] == layout
        (node,) = (node for node in gm.graph.nodes if node.name in done.after)
        assert len(node.all_input_nodes) == 1


@pytest.mark.parametrize(
    "name",
    [pytest.param("llama", marks=pytest.mark.exhaustive), pytest.param("qwen3", marks=pytest.mark.slow)],
)
def test_symbolic_sizes_match_too(capture: Callable[..., Any], name: str) -> None:
    inputs = make_inputs()
    for tensor in inputs.values():
        # Not `dynamic=True`: that also makes tensors of all Python floats, such as an epsilon.
        torch._dynamo.mark_dynamic(tensor, (0, 1))
    captured = capture(make_model(name), (), dynamic=None, **inputs)
    gm, result = rewrite(captured)
    assert count(result) == EXPECTED[name]
    sizes = [size for done in result.rewrites for size in done.match.output.shape]
    assert any(isinstance(size, torch.SymInt) for size in sizes)
    captured.check_equal(gm)
