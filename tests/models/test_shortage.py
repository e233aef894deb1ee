"""Memory that runs out, by errors that a test raises: a planned forward pass runs once more, under a smaller plan."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

import fxopt
from fxopt.capture import torch_tensors
from fxopt.capture.installation import find_installation

SHAPE = (4, 96)


def make(tools, **options):
    model = tools.make_model("llama", num_hidden_layers=6).train()
    return fxopt.optimize(model, **options)


def batch_of(tools):
    return tools.make_batch(SHAPE, padded="none", device="cpu")


def fail(model, times, monkeypatch, then=lambda: None):
    """Make the last block of `model` run out of memory in the next `times` calls of it."""
    calls = find_installation(model)._calls["model.layers"]
    run, left = calls._run, [times]

    def failing(path, block, recorders, args, kwargs):
        if path == "model.layers.5" and left[0]:
            left[0] -= 1
            then()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB\nmore")
        return run(path, block, recorders, args, kwargs)

    monkeypatch.setattr(calls, "_run", failing)
    return left


@pytest.mark.parametrize(
    ("first", "accumulated"),
    [
        ("later", False),
        pytest.param("in the first step", False, marks=pytest.mark.slow),
        pytest.param("later", True, marks=pytest.mark.slow),
        pytest.param("in the first step", True, marks=pytest.mark.exhaustive),
    ],
)
def test_a_forward_pass_runs_again_under_a_smaller_plan(first, accumulated, tools, monkeypatch, caplog):
    batch = batch_of(tools)
    unplanned = make(tools)
    gradients = []
    for model in (unplanned, make(tools, memory_budget=None)):
        if accumulated or first == "later":
            model(**batch).loss.backward()
            if not accumulated:
                model.zero_grad()
        if model is not unplanned:
            left = fail(model, 1, monkeypatch)
            with caplog.at_level(logging.WARNING, "fxopt"):
                loss = model(**batch).loss
            assert left == [0]
        else:
            loss = model(**batch).loss
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
    (plan,) = find_installation(model).planner.plans
    fastest = fxopt.plan(make(tools), None, batch)
    assert plan.recompute_ms > 0
    assert plan.peak_bytes <= max(plan.smallest_bytes, 0.9 * fastest.peak_bytes)
    text = "out of memory (CUDA out of memory. Tried to allocate 1.00 GiB) under budget None, predicted peak"
    assert any(text in record.message for record in caplog.records)
    assert any(text in note for note in find_installation(model).ledger.notes)
    assert not find_installation(model).ledger.fallbacks


@pytest.mark.slow
def test_the_second_error_is_torchs_with_the_plan(tools, monkeypatch):
    batch = batch_of(tools)
    model = make(tools, memory_budget=None)
    model(**batch).loss.backward()
    fail(model, 2, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as error:
        model(**batch)
    (note,) = error.value.__notes__
    assert "this was the second attempt; the plan was: budget None, predicted peak" in note
    model(**batch).loss.backward()


def test_where_no_plan_needs_less_the_error_says_so(tools, monkeypatch):
    model = make(tools, memory_budget="min")
    model(**batch_of(tools)).loss.backward()
    left = fail(model, 2, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError) as error:
        model(**batch_of(tools))
    assert left == [1]
    assert "not run again, since no plan needs less; the plan was: budget min" in error.value.__notes__[0]


def test_what_would_be_done_twice_is_not_run_again(tools, monkeypatch):
    model = make(tools, memory_budget=None)
    model.register_buffer("count", torch.zeros(()))
    model(**batch_of(tools)).loss.backward()
    left = fail(model, 2, monkeypatch, lambda: model.count.add_(1))
    with pytest.raises(torch.OutOfMemoryError) as error:
        model(**batch_of(tools))
    assert left == [1]
    assert "writes to a buffer" in error.value.__notes__[0]


def test_buffers_of_modules_put_in_since_are_not_known(tools, monkeypatch):
    model = make(tools, memory_budget=None)
    model(**batch_of(tools)).loss.backward()
    model.register_buffer("count", torch.zeros(()))
    left = fail(model, 2, monkeypatch, lambda: model.count.add_(1))
    with pytest.raises(torch.OutOfMemoryError) as error:
        model(**batch_of(tools))
    assert left == [1]
    assert "put into the model since" in error.value.__notes__[0]


def full_after(model, monkeypatch, kept):
    """Let a CPU count: each block keeps `kept` bytes, and what is free is what `free` holds."""
    planner, free, level = find_installation(model).planner, [2**40], [0]
    find_facts = planner._find_facts

    def allocated(device):
        level[0] += kept
        return level[0]

    monkeypatch.setattr(torch_tensors, "allocated_bytes", allocated)
    monkeypatch.setattr(planner, "_find_facts", lambda: dataclasses.replace(find_facts(), free_bytes=free[0]))
    return free


@pytest.mark.slow
def test_a_step_that_would_not_fit_begins_again_under_a_plan_that_does(tools, monkeypatch, caplog):
    batch = batch_of(tools)
    small = tools.make_batch((1, 96), padded="none", device="cpu")
    stock, model = make(tools, memory_budget="min"), make(tools)
    smallest = fxopt.plan(model, "min", batch).peak_bytes
    free = full_after(model, monkeypatch, kept=smallest)
    model(**small).loss.backward()
    assert find_installation(model).planner.plans == (), "it fits"
    free[0] = smallest + 1000
    for each in (stock, model):
        each.zero_grad()
        with caplog.at_level(logging.WARNING, "fxopt"):
            each(**batch).loss.backward()
    (plan,) = find_installation(model).planner.plans
    assert plan.budget == "auto"
    assert smallest <= plan.peak_bytes <= free[0]
    (note,) = [note for note in find_installation(model).ledger.notes if "out of memory" in note]
    assert "each, which will not fit) under no plan: run again under the fastest plan that fits" in note
    assert fxopt.explain(model).fallbacks == ()
    for (name, own), (_, other) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        assert torch.equal(own.grad, other.grad), name


def test_an_unplanned_forward_pass_that_runs_out_is_planned(tools, monkeypatch):
    batch, model = batch_of(tools), make(tools)
    model(**batch).loss.backward()
    left = fail(model, 1, monkeypatch)
    model(**batch).loss.backward()
    assert left == [0]
    (plan,) = find_installation(model).planner.plans
    assert plan.budget == "auto"
    assert plan.after, "what follows the blocks is compiled anew, so that the plan knows it"


@pytest.mark.slow
def test_a_plan_made_for_checkpointing_that_is_switched_on_later_knows_what_follows_the_blocks(tools):
    batch, model = batch_of(tools), make(tools)
    model(**batch).loss.backward()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    (plan,) = find_installation(model).planner.plans
    expected = fxopt.plan(make(tools), "min", batch)
    assert plan.peak_bytes == expected.peak_bytes
    assert fxopt.explain(model).fallbacks == ()
