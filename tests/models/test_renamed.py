"""No name decides anything: a model whose every class and attribute is renamed has the same sites."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys

import pytest
import torch
from transformers import AutoConfig

import fxopt

TINY = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
    pad_token_id=0,
)
KEPT = {
    *(
        "config",
        "training",
        "gradient_checkpointing",
        "post_init",
        "loss_function",
        "register_buffer",
        "forward",
    ),
    *(
        "rope_type",
        "inv_freq",
        "original_inv_freq",
        "max_seq_len_cached",
        "original_max_seq_len",
        "rope_init_fn",
    ),
    *("num_key_value_groups", "is_causal"),
}
"""What transformers' own base classes, rotary decorator and attention functions read."""


def rename(source: str) -> tuple[str, dict[str, str]]:
    """Return `source` with each attribute that its modules set, and each class it defines, renamed."""
    set_on_self = set(re.findall(r"self\.(\w+)\s*(?::[^=\n]+)?=(?!=)", source)) - KEPT
    classes = set(re.findall(r"^class (\w+)", source, flags=re.M))
    new = {name: f"z{index}_x" for index, name in enumerate(sorted(set_on_self))}
    new |= {name: f"K{index}" for index, name in enumerate(sorted(classes))}
    for old, fresh in new.items():
        if old in classes:
            source = re.sub(rf"\b{old}\b", fresh, source)
        else:
            source = re.sub(rf"\.{old}\b(?!\s*import)", f".{fresh}", source)
    return source, new


@pytest.mark.parametrize(
    "arch",
    [
        "llama",
        pytest.param("gemma2", marks=pytest.mark.slow),
        *(pytest.param(arch, marks=pytest.mark.exhaustive) for arch in ("qwen2", "olmo2")),
    ],
)
def test_a_renamed_model_has_the_same_sites(arch, tmp_path):
    modeling = importlib.import_module(f"transformers.models.{arch}.modeling_{arch}")
    source = inspect.getsource(modeling)
    source = re.sub(r"from \.\.\.(\w*)", r"from transformers.\1", source)
    source = re.sub(r"from \.(\w+)", rf"from transformers.models.{arch}.\1", source)
    source = source.replace("from transformers. import", "from transformers import")
    renamed, new = rename(source)
    # Reads of the config keep their names; only modules' attributes were renamed.
    for old, fresh in new.items():
        renamed = renamed.replace(f"config.{fresh}", f"config.{old}")
        # So do those of torch's own modules: gemma2's embedding multiplies what `nn.Embedding` looks up.
        renamed = re.sub(rf"(super\(\)\.forward\(.*)\.{fresh}\.dtype", rf"\1.{old}.dtype", renamed)
    name_of_module = f"renamed_{arch}"  # Dynamo finds globals by it
    path = tmp_path / f"{name_of_module}.py"
    path.write_text(renamed)
    spec = importlib.util.spec_from_file_location(name_of_module, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name_of_module] = module
    try:
        spec.loader.exec_module(module)
        (name,) = (name for name in new if name.endswith("ForCausalLM"))
        cls = getattr(module, new[name])
        cls._tied_weights_keys = {}
        config = AutoConfig.for_model(arch, **TINY)
        config._attn_implementation = "sdpa" if arch == "llama" else "eager"
        torch.manual_seed(0)
        renamed_model, stock = cls(config), getattr(modeling, name)(config)
        assert "lm_head.weight" not in dict(renamed_model.named_parameters())
        summaries = []
        for model in (renamed_model, stock):
            report = fxopt.explain(model)
            assert report.fallbacks == ()
            summaries.append(sorted((s.pattern, s.op, s.count, s.status) for s in report.sites))
        assert summaries[0] == summaries[1]
        kinds = {"rms_norm", "rope", "attention", "glu", "linear_cross_entropy"}
        assert {s[0] for s in summaries[0]} == kinds
    finally:
        del sys.modules[name_of_module]
