"""What is wrong with adapters or four-bit weights is said as stock says it, or in the report; no gradient is wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxopt

peft: Any = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def adapted(tools: Any) -> Any:
    """A tiny model with adapters on two projections."""
    torch.manual_seed(1)
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return peft.get_peft_model(tools.make_model("llama"), options).train()


def quantize(model: Any) -> Any:
    """Put layers in four bits in the place of the MLPs' projections."""
    library: Any = pytest.importorskip("bitsandbytes").nn
    for block in model.model.layers:
        for name, layer in list(block.mlp.named_children()):
            if isinstance(layer, nn.Linear):
                new = library.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32
                )
                new.weight = library.Params4bit(
                    layer.weight.data, requires_grad=False, module=new, quant_type="nf4", blocksize=64
                )
                setattr(block.mlp, name, new.to("cpu"))
    return model


def raised(model: Any, batch: dict[str, torch.Tensor]) -> str:
    """Return what a training step of `model` raises."""
    with pytest.raises((RuntimeError, ValueError)) as caught:
        model(**batch).loss.backward()
    return f"{type(caught.value).__name__}: {caught.value}"


def test_an_adapter_that_does_not_fit_raises_what_stock_raises(adapted: Any, tools: Any) -> None:
    layer = adapted.base_model.model.model.layers[1].self_attn.q_proj
    good = layer.lora_A.default.weight
    layer.lora_A.default.weight = nn.Parameter(torch.randn(4, 48))
    batch = tools.make_batch((2, 16), padded="none", device="cpu")
    expected = raised(copy.deepcopy(adapted), batch)
    assert "shapes cannot be multiplied" in expected
    fxopt.optimize(adapted)
    assert raised(adapted, batch) == expected
    layer.lora_A.default.weight = good
    stock = tools.run_step(copy.deepcopy(adapted), batch)
    assert tools.relative(tools.run_step(adapted, batch).loss, stock.loss) < 1e-5


def test_a_block_size_that_the_library_does_not_know_is_never_decoded(tools: Any) -> None:
    model = quantize(tools.make_model("llama"))
    for block in model.model.layers:
        block.mlp.up_proj.weight.quant_state.blocksize = 96
    batch = tools.make_batch((2, 16), padded="none", device="cpu")
    expected = raised(copy.deepcopy(model), batch)
    assert "invalid blocksize 96" in expected
    assert "invalid blocksize 96" in raised(fxopt.optimize(model), batch)


def test_a_library_that_is_too_old_is_named_with_the_release_that_is_needed(
    adapted: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peft, "__version__", "0.18.1")
    fxopt.optimize(adapted)
    expected = "peft 0.18.1: its layers are not recognized and stay stock, expected 0.19 or newer"
    assert expected in caplog.text
    assert any(expected in note for note in fxopt.explain(adapted).notes)


def test_releases_in_use_are_not_doubted(adapted: Any, caplog: pytest.LogCaptureFixture) -> None:
    fxopt.optimize(adapted)
    assert caplog.text == ""


@pytest.mark.slow
def test_a_full_sized_copy_of_a_quantized_base_is_noted(adapted: Any, tools: Any) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    adapted.base_model.model.config.quantization_config = settings
    fxopt.optimize(adapted)
    batch = tools.make_batch((2, 16), padded="none", device="cpu")
    adapted(**batch).loss.backward()
    assert any("a copy of the quantized base is trained" in note for note in fxopt.explain(adapted).notes)
    quantized = quantize(tools.make_model("llama"))
    quantized.config.quantization_config = settings
    torch.manual_seed(1)
    options = peft.LoraConfig(r=4, target_modules=["q_proj"])
    quantized = fxopt.optimize(peft.get_peft_model(quantized, options).train())
    quantized(**batch).loss.backward()
    assert not any("copy of the quantized base" in note for note in fxopt.explain(quantized).notes)
