"""What a run leaves behind: adapters, merged weights, what the model says; as stock's, also on a base in four bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fxopt

peft: Any = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")
BASES = ["dense", pytest.param("nf4", marks=pytest.mark.slow)]
CODES = ("absmax", "code", "offset")


def load(flow: Any, base: str) -> Any:
    """Return the stock model, its layers dense or in four bits, computing in fp32."""
    if base == "dense":
        return flow.load()
    pytest.importorskip("bitsandbytes")
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=base,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        flow.folder, quantization_config=four_bits, dtype=torch.float32, device_map="cpu"
    )
    return stay_trainable(model)


def stay_trainable(model: Any) -> Any:
    """Return `model` so that a CPU with AVX512-BF16 does not repack its codes when it says something.

    Repacked layers pass no gradient on, in stock as well: with bitsandbytes 0.50 a model trains on such a CPU before it
    says something, and not after.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> str:
    """How the weights of the base are stored."""
    return request.param


@pytest.fixture
def trained(flow: Any, base: str) -> Any:
    """An optimized model after one step that moves its adapters far."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=flow.projections, task_type="CAUSAL_LM")
    model = fxopt.optimize(peft.get_peft_model(load(flow, base), config)).train()
    batch = torch.tensor([flow.tokens[0]["input_ids"]])
    model(input_ids=batch, labels=batch).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter += torch.randn_like(parameter) * 0.1
                parameter.grad = None
    report = fxopt.explain(model)
    adapted = [site for site in report.sites if site.pattern == "lora_linear"]
    assert {site.status for site in adapted} == {"rewritten"}
    assert report.fallbacks == ()
    return model.eval()


def say(model: Any, flow: Any) -> list[int]:
    """Return the tokens that the model continues a chat with."""
    inputs = flow.tokenizer.apply_chat_template(
        flow.chats[3]["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)
    return said[0, inputs["input_ids"].shape[1] :].tolist()


def assert_equal_weights(model: Any, expected: Any) -> None:
    """Check that all weights are equal, those in four bits with all that their codes mean."""
    for (name, weight), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert weight.equal(other), name
        state, other_state = (getattr(each, "quant_state", None) for each in (weight, other))
        if state is not None and other_state is not None:
            for field in CODES:
                assert getattr(state, field).equal(getattr(other_state, field)), (name, field)
            assert state.state2.absmax.equal(other_state.state2.absmax), name


def train_floats(model: Any) -> Any:
    """Return `model` in training mode with a gradient for all that is not in four bits."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model.train()


@pytest.mark.slow
def test_it_says_what_a_stock_copy_says_and_trains_on(trained: Any, flow: Any) -> None:
    stock = copy.deepcopy(trained)
    said = say(trained, flow)
    assert said == say(stock, flow)
    batch = torch.tensor([flow.tokens[1]["input_ids"]])
    loss, expected = (model.train()(input_ids=batch, labels=batch).loss for model in (trained, stock))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert fxopt.explain(trained).fallbacks == ()


@pytest.mark.slow
def test_a_saved_adapter_is_read_back_on_a_stock_base(
    trained: Any, flow: Any, base: str, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(flow, base), tmp_path)
    names = {name for name, _ in trained.named_parameters()}
    assert names == {name for name, _ in again.named_parameters()}
    assert_equal_weights(trained, again)
    assert say(again, flow) == say(trained, flow)
    batch = torch.tensor([flow.tokens[1]["input_ids"]])
    expected = trained.train()(input_ids=batch, labels=batch).loss
    resumed = peft.PeftModel.from_pretrained(load(flow, base), tmp_path, is_trainable=True)
    loss = fxopt.optimize(resumed).train()(input_ids=batch, labels=batch).loss
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("base", "restored"),
    [
        pytest.param("dense", True, id="dense, after restore", marks=pytest.mark.slow),
        pytest.param("nf4", False, id="nf4, without restore", marks=pytest.mark.slow),
        pytest.param("dense", False, id="dense, without restore", marks=pytest.mark.exhaustive),
        pytest.param("nf4", True, id="nf4, after restore", marks=pytest.mark.exhaustive),
    ],
    indirect=["base"],
)
def test_adapters_are_merged(trained: Any, flow: Any, tmp_path: Path, restored: bool) -> None:
    stock = copy.deepcopy(trained).merge_and_unload()
    merged = (fxopt.restore(trained) if restored else trained).merge_and_unload()
    assert_equal_weights(merged, stock)
    said = say(merged, flow)
    assert said == say(stock, flow)
    merged.save_pretrained(tmp_path)
    again = stay_trainable(type(merged).from_pretrained(tmp_path, dtype=torch.float32))
    assert_equal_weights(again, merged)
    assert say(again, flow) == said
    batch = torch.tensor([flow.tokens[1]["input_ids"]])
    loss, expected = (train_floats(model)(input_ids=batch, labels=batch).loss for model in (merged, again))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    again = fxopt.optimize(merged)
    assert float(again(input_ids=batch, labels=batch).loss) == pytest.approx(float(expected), rel=1e-5)


def test_merged_into_dense_weights_it_says_what_its_adapters_said(flow: Any, tmp_path: Path) -> None:
    """In four bits a merge rounds; there what is merged may say something else, in stock as well."""
    model = flow.make(optimized=True).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn_like(parameter) * 0.1
    batch = torch.tensor([flow.tokens[0]["input_ids"]])
    model(input_ids=batch, labels=batch).loss.backward()
    before = say(model, flow)
    assert say(model.merge_and_unload(), flow) == before
