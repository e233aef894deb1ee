"""TRL's trainers on an optimized model: each step as on a stock one, with data in every form they take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import fxopt

trl: Any = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

CASES: dict[str, dict[str, Any]] = {
    "completion only": {"data": "chats", "completion_only_loss": True},
    "packed": {"packing": True},
    "padding-free": {"padding_free": True, "max_length": None},
    "whole chats": {},
    "packed and cut": {"packing": True, "packing_strategy": "wrapped"},
    "checkpointed": {"gradient_checkpointing": True},
    "noise on the embeddings": {"neftune_noise_alpha": 5},
    "dropout": {"lora": {"lora_dropout": 0.1}},
}
TOLERANCES = {"dropout": 1e-4, "padding-free": 3e-5}
"""Others than 1e-5, relative: on a CPU with OpenBLAS's Haswell kernels the third gradient norm was 1.25e-5 off."""
QUICK = ("packed",)
EXHAUSTIVE = ("whole chats", "packed and cut", "checkpointed", "noise on the embeddings", "dropout")


def train(
    flow: Any, output: Path, *, optimized: bool, case: dict[str, Any], verify: str = "on", **settings: Any
) -> Any:
    """Return a trainer that has run."""
    case = {**case, **settings}
    data, lora = case.pop("data", "messages"), case.pop("lora", {})
    arguments = {"max_length": 80, **case}
    trainer = trl.SFTTrainer(
        model=flow.make(optimized=optimized, verify=verify, **lora),
        train_dataset=getattr(flow, data),
        processing_class=flow.tokenizer,
        args=trl.SFTConfig(**flow.settings(output, **arguments)),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in QUICK
        else pytest.param(name, marks=pytest.mark.exhaustive if name in EXHAUSTIVE else pytest.mark.slow)
        for name in CASES
    ],
)
def test_each_step_is_stocks(name: str, flow: Any, checks: Any, tmp_path: Path) -> None:
    ours = train(flow, tmp_path / "ours", optimized=True, case=CASES[name])
    stock = train(flow, tmp_path / "stock", optimized=False, case=CASES[name])
    checks.alike(flow.figures(ours), flow.figures(stock), tolerance=TOLERANCES.get(name, 1e-5))
    checks.only_the_head_is_stock(ours.model)


@pytest.mark.slow
def test_all_weights_trained(flow: Any, checks: Any, tmp_path: Path) -> None:
    trainers: list[Any] = []
    for optimized in (True, False):
        model = fxopt.optimize(flow.load()) if optimized else flow.load()
        trainer = trl.SFTTrainer(
            model=model,
            train_dataset=flow.chats,
            processing_class=flow.tokenizer,
            args=trl.SFTConfig(**flow.settings(tmp_path / str(optimized), learning_rate=1e-3, max_length=80)),
        )
        trainer.train()
        trainers.append(trainer)
    ours, stock = trainers
    checks.alike(flow.figures(ours), flow.figures(stock))
    checks.only_the_head_is_stock(ours.model)


@pytest.mark.slow
def test_preferences_against_the_model_without_its_adapters(flow: Any, checks: Any, tmp_path: Path) -> None:
    pairs = flow.chats.map(
        lambda row: {
            "chosen": row["completion"],
            "rejected": [{"role": "assistant", "content": row["completion"][0]["content"][::-1]}],
        },
        remove_columns=["completion"],
    )
    trainers: list[Any] = []
    for optimized in (True, False):
        trainer = trl.DPOTrainer(
            model=flow.make(optimized=optimized),
            train_dataset=pairs,
            processing_class=flow.tokenizer,
            args=trl.DPOConfig(**flow.settings(tmp_path / str(optimized), max_length=80)),
        )
        trainer.train()
        trainers.append(trainer)
    ours, stock = trainers
    checks.alike(flow.figures(ours), flow.figures(stock))
    checks.only_the_head_is_stock(ours.model)
    first, *_, last = flow.figures(ours)
    assert first["loss"] == pytest.approx(math.log(2))  # the reference is the model itself, then no longer
    assert last["loss"] < first["loss"]


@pytest.mark.slow
def test_a_run_goes_on_in_the_middle_with_the_same_losses(flow: Any, checks: Any, tmp_path: Path) -> None:
    case = CASES["dropout"] | {"data": "chats"}
    whole = train(
        flow,
        tmp_path,
        optimized=True,
        verify="off",
        case=case,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
    )
    model = flow.make(optimized=True, verify="off", **case["lora"])
    again = trl.SFTTrainer(
        model=model,
        train_dataset=flow.chats,
        processing_class=flow.tokenizer,
        args=trl.SFTConfig(**flow.settings(tmp_path, max_steps=4, max_length=80)),
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = flow.figures(whole)
    assert [row["step"] for row in expected] == [1, 2, 3, 4]
    checks.alike(flow.figures(again), expected, tolerance=1e-6)
    for name, weight in whole.model.named_parameters():
        assert weight.equal(dict(again.model.named_parameters())[name]), name
