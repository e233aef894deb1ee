"""What a run leaves behind: adapters, merged weights and what the model says are as stock's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import fxopt

peft: Any = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def trained(flow: Any) -> Any:
    """An optimized model after one step that moves its adapters far."""
    model = flow.make(optimized=True).train()
    batch = torch.tensor([flow.tokens[0]["input_ids"]])
    model(input_ids=batch, labels=batch).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter += torch.randn_like(parameter) * 0.1
                parameter.grad = None
    return model.eval()


def say(model: Any, flow: Any) -> list[int]:
    """Return the tokens that the model continues a chat with."""
    inputs = flow.tokenizer.apply_chat_template(
        flow.chats[3]["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)
    return said[0, inputs["input_ids"].shape[1] :].tolist()


def test_it_says_what_a_stock_copy_says_and_trains_on(trained: Any, flow: Any) -> None:
    stock = copy.deepcopy(trained)
    said = say(trained, flow)
    assert said == say(stock, flow)
    batch = torch.tensor([flow.tokens[1]["input_ids"]])
    loss, expected = (model.train()(input_ids=batch, labels=batch).loss for model in (trained, stock))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert fxopt.explain(trained).fallbacks == ()


def test_a_saved_adapter_is_read_back_on_a_stock_base(trained: Any, flow: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(flow.load(), tmp_path)
    stock = dict(again.named_parameters())
    names = {name for name, _ in trained.named_parameters()}
    assert names == set(stock)
    for name, weight in trained.named_parameters():
        assert weight.equal(stock[name]), name
    assert say(again, flow) == say(trained, flow)


@pytest.mark.parametrize("restored", [True, False], ids=["after restore", "without restore"])
def test_adapters_are_merged(trained: Any, flow: Any, tmp_path: Path, restored: bool) -> None:
    stock = copy.deepcopy(trained).merge_and_unload()
    before = say(trained, flow)
    merged = (fxopt.restore(trained) if restored else trained).merge_and_unload()
    for (name, weight), expected in zip(merged.named_parameters(), stock.parameters(), strict=True):
        assert weight.equal(expected), name
    assert say(merged, flow) == before
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, dtype=torch.float32)
    assert say(again, flow) == before
    batch = torch.tensor([flow.tokens[1]["input_ids"]])
    for model in (merged, again):
        model.train().requires_grad_(True)
    loss, expected = (model(input_ids=batch, labels=batch).loss for model in (merged, again))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    again = fxopt.optimize(merged)
    assert float(again(input_ids=batch, labels=batch).loss) == pytest.approx(float(expected), rel=1e-5)
