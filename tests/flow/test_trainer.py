"""transformers' own Trainer on an optimized model: steps, evaluation and metrics as on a stock one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import fxopt

pytestmark = pytest.mark.filterwarnings("ignore")


def accuracy(prediction: Any) -> dict[str, float]:
    """Return how often the most likely token is the right one; reads the logits of all batches."""
    logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float((logits.argmax(-1) == labels)[labels != -100].mean())}


def train(flow: Any, output: Path, model: Any, **settings: Any) -> Any:
    """Return a trainer that has run, with an evaluation at its second step."""
    trainer = Trainer(
        model=model,
        train_dataset=flow.tokens,
        eval_dataset=flow.tokens.select(range(6)),
        data_collator=DataCollatorForLanguageModeling(flow.tokenizer, mlm=False),
        compute_metrics=accuracy,
        args=TrainingArguments(
            **flow.settings(output, eval_strategy="steps", eval_steps=2, **settings),
        ),
    )
    trainer.train()
    return trainer


def test_steps_and_evaluations_are_stocks(flow: Any, checks: Any, tmp_path: Path) -> None:
    """Gradients are accumulated over micro-batches of different lengths: the loss is by `num_items_in_batch`."""
    ours = train(flow, tmp_path / "ours", flow.make(optimized=True))
    stock = train(flow, tmp_path / "stock", flow.make(optimized=False))
    checks.alike(flow.figures(ours), flow.figures(stock))
    assert {"loss", "grad_norm", "eval_loss", "eval_accuracy"} <= set().union(*flow.figures(ours))
    report = fxopt.explain(ours.model)
    assert report.fallbacks == ()
    assert {region.status for region in report.regions} == {"captured"}
    assert {site.status for site in report.sites} == {"rewritten"}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True], ids=["saved", "checkpointed"])
def test_all_weights_trained(flow: Any, checks: Any, tmp_path: Path, checkpointed: bool) -> None:
    settings = {"learning_rate": 1e-3, "gradient_checkpointing": checkpointed}
    ours = train(flow, tmp_path / "ours", fxopt.optimize(flow.load()), **settings)
    stock = train(flow, tmp_path / "stock", flow.load(), **settings)
    checks.alike(flow.figures(ours), flow.figures(stock))
    assert fxopt.explain(ours.model).fallbacks == ()


@pytest.mark.slow
def test_an_optimized_and_a_stock_model_train_side_by_side(flow: Any, tmp_path: Path) -> None:
    """Their steps alternate in one process; the stock one is not touched by the other's captures."""
    batch = DataCollatorForLanguageModeling(flow.tokenizer, mlm=False)([flow.tokens[i] for i in range(2)])
    ours, stock, alone = flow.make(optimized=True), flow.make(optimized=False), flow.make(optimized=False)
    losses: dict[str, list[float]] = {"ours": [], "stock": [], "alone": []}

    def step(name: str, model: Any) -> None:
        loss = model.train()(**batch).loss
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad
                parameter.grad = None
        losses[name].append(float(loss))

    for _ in range(3):
        step("alone", alone)
    for _ in range(3):
        step("ours", ours)
        step("stock", stock)
    assert losses["stock"] == losses["alone"]
    assert losses["ours"] == pytest.approx(losses["stock"], rel=1e-5)
    assert losses["ours"][-1] < losses["ours"][0]
    assert fxopt.explain(ours).fallbacks == ()


@pytest.mark.slow
def test_the_callback_logs_memory_fallbacks_and_recompiles(
    flow: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = flow.make(optimized=True, verify="off")
    trainer = Trainer(
        model=model,
        train_dataset=flow.tokens,
        data_collator=DataCollatorForLanguageModeling(flow.tokenizer, mlm=False),
        args=TrainingArguments(**flow.settings(tmp_path)),
        callbacks=[fxopt.TrainerCallback()],
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["fxopt_fallbacks"] for row in logged] == [0, 0, 0]
    assert [row["fxopt_recompiles"] for row in logged] == [1, 1, 1]  # the first block's input has no gradient
    assert all(row["fxopt_peak_gib"] > 0.1 for row in logged)
    block = model.base_model.model.model.layers[0]
    handle = block.mlp.register_forward_hook(lambda module, inputs, output: None)
    trainer.train()
    handle.remove()
    last = [row for row in trainer.state.log_history if "loss" in row][-1]
    assert last["fxopt_fallbacks"] > 0
    warned = [record.getMessage() for record in caplog.records if record.name == "fxopt"]
    assert sum("ran stock so far: a hook sits on" in line for line in warned) == len(
        {fallback.region for fallback in fxopt.explain(model).fallbacks}
    )


def test_the_callback_says_that_a_model_is_not_optimized(
    flow: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(
        model=flow.make(optimized=False),
        train_dataset=flow.tokens,
        data_collator=DataCollatorForLanguageModeling(flow.tokenizer, mlm=False),
        args=TrainingArguments(**flow.settings(tmp_path, max_steps=1)),
        callbacks=[fxopt.TrainerCallback()],
    )
    trainer.train()
    assert "PeftModelForCausalLM is not optimized" in caplog.text
    assert not any("fxopt_fallbacks" in row for row in trainer.state.log_history)
