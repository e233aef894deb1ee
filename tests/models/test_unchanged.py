"""What must not change: parameters, files, copies, signatures, evaluation, generation, the Trainer."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import fxopt


def test_parameters_stay_the_same_objects_under_the_same_names(tools):
    model = tools.make_model("llama")
    before = dict(model.named_parameters())
    state, signature, classes = (
        model.state_dict(),
        inspect.signature(model.forward),
        [type(m) for m in model.modules()],
    )
    assert fxopt.optimize(model) is model
    tools.run_step(model, tools.make_batch((2, 16), padded="none", device="cpu"))
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert state.keys() == model.state_dict().keys()
    assert inspect.signature(model.forward) == signature
    assert [type(m) for m in model.modules()] == classes
    assert all("forward" not in m.__dict__ and "_call_impl" not in m.__dict__ for m in model.modules())


def test_restore_gives_back_stock_bit_for_bit(twins, tools):
    model, stock = twins("llama")
    batch = tools.make_batch((2, 16), padded="left", device="cpu")
    tools.run_step(model, batch)
    assert fxopt.restore(model) is model
    ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
    assert torch.equal(ours.loss, theirs.loss)
    assert all(torch.equal(ours.gradients[n], theirs.gradients[n]) for n in theirs.gradients)
    assert not any("_compiled_call_impl" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, pytest.param(lambda m: pickle.loads(pickle.dumps(m)), marks=pytest.mark.slow)],
)
def test_a_copy_is_a_stock_model_with_its_own_weights(twins, tools, duplicate):
    model, _stock = twins("llama")
    batch = tools.make_batch((2, 16), padded="none", device="cpu")
    tools.run_step(model, batch)
    twin = duplicate(model)
    before = tools.run_step(model, batch)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    tools.run_step(twin, batch)
    after = tools.run_step(model, batch)
    assert torch.equal(before.loss, after.loss)
    told = fxopt.explain(twin)
    assert "the model is stock" in told.notes[0]
    assert str(told).splitlines()[1].startswith("the model is stock: fxopt.optimize would rewrite ")
    assert "Stock model: sites that fxopt.optimize would rewrite" in told._repr_html_()
    assert not any("the model is stock" in note for note in fxopt.explain(model).notes)
    with pytest.raises(fxopt.FxoptError, match="is not optimized"):
        fxopt.restore(twin)


def test_save_and_load_round_trip(twins, tools, tmp_path):
    model, stock = twins("llama")
    batch = tools.make_batch((2, 16), padded="none", device="cpu")
    tools.run_step(model, batch)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert torch.equal(tools.run_step(loaded, batch).loss, tools.run_step(stock, batch).loss)


def test_evaluation_no_grad_and_generation_equal_stock_bit_for_bit(twins, tools):
    model, stock = twins("llama")
    batch = tools.make_batch((2, 16), padded="left", device="cpu")
    tools.run_step(model, batch)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, stock(**batch).logits)
    model.eval(), stock.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, stock(**batch).loss)
    prompt = batch["input_ids"][1:, :7]
    assert torch.equal(
        model.generate(prompt, max_new_tokens=9, do_sample=False),
        stock.generate(prompt, max_new_tokens=9, do_sample=False),
    )
    assert fxopt.explain(model).fallbacks == ()


@pytest.mark.slow
def test_gradient_accumulation_and_an_optimizer_follow_stock(twins, tools):
    model, stock = twins("qwen2")
    losses = []
    for each in (model, stock):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3)
        history = []
        for _step in range(3):
            for micro in range(2):
                batch = tools.make_batch((2, 16), padded="none", device="cpu")
                tokens = batch["input_ids"].roll(micro, dims=1)
                loss = each(input_ids=tokens, labels=tokens).loss / 2
                loss.backward()
                history.append(float(loss))
            optimizer.step()
            optimizer.zero_grad()
        losses.append(history)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradient_checkpointing_equals_stock_and_is_rewritten(twins, tools, use_reentrant):
    model, stock = twins("llama")
    for each in (model, stock):
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    batch = tools.make_batch((2, 16), padded="none", device="cpu")
    ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
    assert tools.relative(ours.loss, theirs.loss) < 1e-5
    for name, gradient in theirs.gradients.items():
        assert tools.relative(ours.gradients[name], gradient) < 1e-4, name
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert {site.status for site in report.sites} == {"rewritten"}


def test_logits_in_training_are_lazy_and_equal_stock(twins, tools):
    model, stock = twins("llama")
    batch = tools.make_batch((2, 16), padded="none", device="cpu")
    ours, theirs = model(**batch), stock(**batch)
    assert isinstance(ours.logits, torch.Tensor)
    assert ours.logits.shape == theirs.logits.shape
    assert ours.logits.float().is_lazy
    assert tools.relative(ours.logits.double(), theirs.logits.double()) < 1e-5


class Rows(torch.utils.data.Dataset):
    """Sixteen rows of tokens."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 256, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(
    "bf16",
    [
        pytest.param(False, marks=pytest.mark.exhaustive),  # as in tests/flow/test_trainer.py
        pytest.param(True, marks=pytest.mark.slow),
    ],
)
def test_the_trainer_trains_and_evaluates_with_metrics(twins, tmp_path, bf16):
    model, stock = twins("llama")
    logs, metrics = [], []
    for each in (model, stock):
        seen = []

        def compute_metrics(prediction, seen=seen):
            seen.append(prediction.predictions.shape)
            return {"top": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=bf16,
            seed=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(
            each, arguments, train_dataset=Rows(), eval_dataset=Rows(), compute_metrics=compute_metrics
        )
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        metrics.append(trainer.evaluate()["eval_top"])
        assert seen == [(16, 16, 256)]
    # Measured over the four steps: 1.4e-5 in bf16 and 8.6e-8 in fp32; the metrics were equal.
    assert logs[0] == pytest.approx(logs[1], rel=2e-4 if bf16 else 1e-6)
    one_token = 1 / (16 * 16)
    assert metrics[0] == pytest.approx(metrics[1], abs=one_token if bf16 else 1e-9)
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert any(site.op == "linear_cross_entropy" for site in report.sites)


@pytest.mark.slow
def test_peft_adapters_are_trained_as_in_stock(tools):
    from peft import LoraConfig, get_peft_model

    steps = []
    for optimized in (True, False):
        base = tools.make_model("llama")
        torch.manual_seed(1)
        model = get_peft_model(
            base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
        )
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        if optimized:
            fxopt.optimize(model)
        steps.append(tools.run_step(model, tools.make_batch((2, 16), padded="right", device="cpu")))
        if optimized:
            report = fxopt.explain(model)
            assert report.fallbacks == ()
            assert {s.status for s in report.sites} == {"rewritten"}
    ours, theirs = steps
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert all("lora" in name for name in ours.gradients)
    for name, gradient in theirs.gradients.items():
        assert tools.relative(ours.gradients[name], gradient) < 1e-4, name


@pytest.mark.slow
def test_torch_compile_with_the_backend_is_the_same_pipeline(tools):
    stock, model = tools.make_model("llama"), tools.make_model("llama")
    for each in (stock, model):
        each.config.use_cache = False
    compiled = torch.compile(model, backend="fxopt")
    batch = tools.make_batch((2, 16), padded="none", device="cpu")
    out, expected = compiled(**batch), stock(**batch)
    out.loss.backward()
    expected.loss.backward()
    assert tools.relative(out.loss.double(), expected.loss.double()) < 1e-5
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert tools.relative(ours.grad.double(), theirs.grad.double()) < 1e-4
    assert out.logits.float().is_lazy
