"""A model whose weights lie on devices of several types fails as in stock, and says where they lie."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt
from fxopt.capture.devices import mixture_told

TINY = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=64,
    head_dim=8,
)
IDS = torch.arange(12).reshape(2, 6)


def test_a_weight_on_another_device_is_named_beside_torchs_error():
    """A CPU and the meta device stand for a GPU and a CPU."""
    model = fxopt.optimize(LlamaForCausalLM(LlamaConfig(**TINY)).train(), verify="off")
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(RuntimeError, match="device") as raised:
        model(input_ids=IDS, labels=IDS)
    assert raised.value.__notes__ == [
        "fxopt: the model's tensors are on 2 types of devices, expected one, got 22 on cpu and 1 on meta "
        "(model.layers.1.mlp.up_proj.weight)\nfxopt: move the model as a whole: model.to('cpu')"
    ]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory on the device"), RuntimeError("no batch left")]
)
def test_an_error_about_something_else_has_no_such_note(error):
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(RuntimeError) as raised, mixture_told(model):
        raise error
    assert not hasattr(raised.value, "__notes__")


def test_an_error_of_a_model_on_one_device_has_no_such_note():
    model = fxopt.optimize(LlamaForCausalLM(LlamaConfig(**TINY)).train(), verify="off")
    with pytest.raises(RuntimeError) as raised:
        model(inputs_embeds=torch.ones(2, 6, 8), labels=IDS)
    assert not hasattr(raised.value, "__notes__")
