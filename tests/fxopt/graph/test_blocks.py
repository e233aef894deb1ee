"""Real blocks of transformers, as Dynamo captures them: the same bits after canonicalization, and the anchors
counted by hand from the source of each model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from fxopt.graph.anchors import find_anchors
from fxopt.graph.snapshot import count_ops

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 97,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# model type: anchors in one block; q and k are turned in each
BLOCKS = {
    "llama": {"rms_norm": 2, "rope": 2, "attention": 1, "glu": 1},
    "qwen2": {"rms_norm": 2, "rope": 2, "attention": 1, "glu": 1},
    "qwen3": {"rms_norm": 4, "rope": 2, "attention": 1, "glu": 1},  # with the norms of q and k
    "gemma2": {"rms_norm": 4, "rope": 2, "attention": 1, "glu": 1},  # before and after attention and MLP
    "olmo2": {
        "rms_norm": 4,
        "rope": 2,
        "attention": 1,
        "glu": 1,
    },  # of q, of k, after attention, after the MLP
    # attention and MLP stand side by side behind one centred norm
    "cohere": {"rms_norm": 1, "rope": 2, "attention": 1, "glu": 1},
    "gpt_oss": {
        "rms_norm": 2,
        "rope": 2,
        "attention": 1,
        "glu": 1,
        "experts": 1,
        "route": 1,
    },  # all experts at once; the clamped, shifted form
    "glm4": {"rms_norm": 4, "rope": 2, "attention": 1, "glu": 1},  # gate and up from one packed projection
    "phi3": {"rms_norm": 2, "rope": 2, "attention": 1, "glu": 1},
    "qwen3_moe": {"rms_norm": 4, "rope": 2, "attention": 1, "glu": 1, "experts": 1, "route": 1},
    "gpt_neox": {"layer_norm": 2, "rope": 2, "attention": 1, "activation": 1},
    "nanochat": {"rms_norm": 4, "rope": 2, "attention": 1, "activation": 1},  # with the norms of q and k
    "starcoder2": {"layer_norm": 2, "rope": 2, "attention": 1, "activation": 1},
    "stablelm": {"layer_norm": 2, "rope": 2, "attention": 1, "glu": 1},
}
SLOW = ("qwen2", "olmo2", "gpt_oss", "starcoder2", "stablelm")
"""They take longest, or are made of what others here are made of."""


def capture_block(
    model: Any, block: Any, into: list[Any], dynamic: bool | None = None, **inputs: Any
) -> None:
    def backend(gm: Any, example_inputs: list[Any]) -> Any:
        into.append((gm, [_copy(item) for item in example_inputs]))
        return gm.forward

    torch._dynamo.reset()
    block.compile(backend=backend, dynamic=dynamic)
    model(**inputs)


def _copy(item: Any) -> Any:
    if isinstance(item, torch.SymInt):
        return item.node.hint
    return item.detach().clone().requires_grad_(item.requires_grad)


def build(kind: str, **extra: Any) -> Any:
    experts = EXPERTS if kind in ("gpt_oss", "qwen3_moe") else {}
    config = AutoConfig.for_model(kind, **{**SIZES, **experts, **extra})
    model = AutoModelForCausalLM.from_config(config).train()
    return model.bfloat16() if experts else model  # grouped products are bfloat16 only under fake tensors


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in BLOCKS]
)
def test_a_block_keeps_its_bits_and_its_anchors_are_counted(kind, canonical) -> None:
    model, captured = build(kind), []
    layers = model.get_decoder().layers
    ids = torch.randint(3, 97, (2, 6))
    capture_block(model, layers[0], captured, input_ids=ids, use_cache=False)
    assert len(captured) == 1
    gm, inputs = captured[0]
    anchors = find_anchors(gm)
    assert Counter(anchor.kind for anchor in anchors) == BLOCKS[kind]
    assert all(anchor.location.split(":")[0].endswith(".py") for anchor in anchors)
    gm = canonical((gm, inputs))
    origins = {name for node in gm.graph.nodes for name in node.meta["origins"]}
    assert {anchor.node for anchor in anchors} <= origins
    methods = {op for op in count_ops(gm) if op.startswith(".")}
    assert methods.isdisjoint(
        {".to", ".float", ".pow", ".mean", ".view", ".reshape", ".transpose", ".contiguous"}
    )


def test_an_encoder_block_of_t5(canonical) -> None:
    config = AutoConfig.for_model(
        "t5",
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        vocab_size=97,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
        decoder_start_token_id=0,
    )
    model, captured = AutoModelForSeq2SeqLM.from_config(config).train(), []
    ids = torch.randint(3, 97, (2, 6))
    capture_block(model, model.encoder.block[0], captured, input_ids=ids, labels=ids)
    gm, inputs = captured[0]
    anchors = find_anchors(gm)
    assert Counter(anchor.kind for anchor in anchors) == {"rms_norm": 2, "glu": 1, "attention": 1}
    gm = canonical((gm, inputs))
    assert (
        count_ops(gm)["dropout"] == 3
    )  # after attention, between gate and down, after the MLP; that of the weights is in sdpa


def test_a_whole_model_with_its_loss(capture, canonical) -> None:
    model = build("llama")
    ids = torch.randint(3, 97, (2, 6))
    captured = capture(model, input_ids=ids, labels=ids, use_cache=False)
    anchors = find_anchors(captured.gm)
    assert [anchor.kind for anchor in anchors] == [
        "rms_norm",
        "rope",
        "rope",
        "attention",
        "rms_norm",
        "glu",
        "rms_norm",
        "linear_cross_entropy",
    ]
    modules = [anchor.module for anchor in anchors]
    assert modules[:7] == [
        "model.layers.0.input_layernorm",
        *["model.layers.0.self_attn"] * 3,
        "model.layers.0.post_attention_layernorm",
        "model.layers.0.mlp",
        "model.norm",
    ]
    files = [anchor.location.split(":")[0] for anchor in anchors]
    assert files == [
        *["modeling_llama.py"] * 3,
        "sdpa_attention.py",
        *["modeling_llama.py"] * 3,
        "loss_utils.py",
    ]
    canonical(captured)


@pytest.mark.slow
def test_logits_that_are_capped_come_from_a_linear(capture, canonical) -> None:
    ids = torch.randint(3, 97, (2, 6))
    captured = capture(build("gemma2"), input_ids=ids, labels=ids, use_cache=False)
    assert find_anchors(captured.gm)[-1].kind == "linear_cross_entropy"
    canonical(captured)


def test_checkpointed_blocks_are_looked_into(capture, canonical) -> None:
    model = build("llama")
    model.gradient_checkpointing_enable()
    ids = torch.randint(3, 97, (2, 6))
    captured = capture(model, input_ids=ids, labels=ids, use_cache=False)
    if not any(node.op == "get_attr" for node in captured.gm.graph.nodes):
        pytest.skip("this transformers checkpoints outside of the captured call")
    nodes = [anchor.node for anchor in find_anchors(captured.gm)]
    assert sum("/" in node for node in nodes) == 6
    canonical(captured)


def test_autocast_with_symbolic_shapes(canonical) -> None:
    model, captured = build("llama"), []
    ids = torch.randint(3, 97, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        capture_block(model, model.model.layers[0], captured, dynamic=True, input_ids=ids, use_cache=False)
        gm, inputs = captured[0]
        assert Counter(anchor.kind for anchor in find_anchors(gm)) == BLOCKS["llama"]
        canonical((gm, inputs))
