"""Whole models whose blocks are replayed as CUDA graphs: the results of launching one by one, whatever a user does."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fxopt

pytestmark = pytest.mark.gpu
LAYERS = 3
RECORDING = 3
"""Calls before a shape is replayed: one warms up, one records, and one is to spare."""


def count_replays(run: Callable[[], Any]) -> int:
    """Return how many CUDA graphs `run` launches."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum("GraphLaunch" in event.name for event in trace.events())


@pytest.fixture
def pair(twins: Any) -> Callable[..., tuple[Any, Any]]:
    """Return a builder of a replayed model and a twin whose kernels are launched one by one."""

    gc.collect()  # a loss that an earlier test left in a cycle still waits for its backward pass

    def build(arch: str = "llama", **options: Any) -> tuple[Any, Any]:
        model, stock = twins(arch, "cuda", **options)
        return model, fxopt.optimize(stock, cuda_graphs="off")

    return build


def assert_equal(model: Any, twin: Any) -> None:
    """Check that all gradients are the same bits."""
    for (name, own), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None), name
        if own.grad is not None:
            assert torch.equal(own.grad, other.grad), name


@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen3", "gpt_neox", "single_level"])
def test_training_is_the_same_bit_for_bit_and_blocks_are_replayed(arch, pair, tools):
    model, twin = pair(arch)
    ours, theirs = (torch.optim.AdamW(each.parameters(), 1e-3) for each in (model, twin))
    for step in range(6):
        batch = tools.make_batch((2, 24), padded=("none", "left", "right")[step % 3], device="cuda")
        losses = []
        for each, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            loss = each(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert torch.equal(*losses), step
        assert_equal(model, twin)
    batch = tools.make_batch((2, 24), padded="none", device="cuda")
    assert count_replays(lambda: model(**batch).loss.backward()) == 2 * LAYERS, fxopt.explain(model).notes
    assert count_replays(lambda: twin(**batch).loss.backward()) == 0
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert "replayed as CUDA graphs" in report.lowering


def test_gradients_accumulate_over_micro_batches(pair, tools):
    model, twin = pair()
    for _ in range(3):
        for each in (model, twin):
            each.zero_grad()
        for seed in range(3):
            batch = tools.make_batch((2, 24), padded="none", device="cuda")
            batch["labels"] = batch["labels"].roll(seed, 1)
            for each in (model, twin):
                each(**batch).loss.backward()
        assert_equal(model, twin)


def test_two_calls_before_one_backward_pass(pair, tools):
    model, twin = pair()
    batches = [tools.make_batch((2, 24), padded=padded, device="cuda") for padded in ("none", "left")]
    for _ in range(RECORDING + 1):
        for each in (model, twin):
            each.zero_grad()
            first, second = (each(**batch).loss for batch in batches)
            (first * 2 + second).backward()
        assert_equal(model, twin)
    notes = fxopt.explain(model).notes
    assert any("waits for its backward pass" in note for note in notes), notes


def test_calls_without_a_backward_pass_and_evaluation_in_between(pair, tools):
    model, twin = pair()
    batch = tools.make_batch((2, 24), padded="none", device="cuda")
    losses: list[torch.Tensor] = []
    for _ in range(RECORDING + 1):
        for each in (model, twin):
            each.zero_grad()
            _ = each(**batch).loss  # dropped
            with torch.no_grad():
                _ = each(**batch).loss
            each.eval()
            losses.append(each(**batch).loss.detach())
            each.train()
            each(**batch).loss.backward()
        assert_equal(model, twin)
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_what_the_model_returned_stays_as_it_was(pair, tools):
    model, twin = pair()
    batches = [tools.make_batch((2, 24), padded=padded, device="cuda") for padded in ("none", "left")]
    for step in range(2 * RECORDING):
        outputs = [each(**batches[step % 2], output_hidden_states=True) for each in (model, twin)]
        for own, other in zip(*(output.hidden_states for output in outputs), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
        kept = [state.detach() for state in outputs[0].hidden_states]
        before = [state.clone() for state in kept]
        outputs[0].loss.backward()
        model(**batches[(step + 1) % 2]).loss.backward()
        assert all(torch.equal(own, other) for own, other in zip(kept, before, strict=True))


def test_a_base_model_that_returns_its_blocks_result(tools):
    model, twin = (tools.make_model("llama").model.cuda() for _ in range(2))
    for each in (model, twin):
        each.norm = torch.nn.Identity()
    fxopt.optimize(model)
    batches = [tools.make_batch((2, 24), padded=padded, device="cuda") for padded in ("none", "left")]
    for batch in batches:
        del batch["labels"]
    kept: list[torch.Tensor] = []
    for step in range(2 * RECORDING):
        results = [each(**batches[step % 2]).last_hidden_state for each in (model, twin)]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        results[0].sum().backward()
        kept.append(results[0].detach())
    assert not torch.equal(kept[-1], kept[-2])
    assert torch.equal(kept[-1], kept[-3])


def test_other_lengths_and_other_weights(pair, tools):
    model, twin = pair()
    for length in (24, 24, 24, 17, 24, 31, 17, 24):
        batch = tools.make_batch((2, length), padded="none", device="cuda")
        for each in (model, twin):
            each.zero_grad()
            each(**batch).loss.backward()
        assert_equal(model, twin)
    with torch.no_grad():
        for each in (model, twin):
            for parameter in each.parameters():
                parameter.data = parameter.data * 1.5  # at another address
    for _ in range(RECORDING):
        for each in (model, twin):
            each.zero_grad()
            each(**batch).loss.backward()
        assert_equal(model, twin)


def test_dropout_draws_what_launching_one_by_one_draws(pair, tools):
    model, twin = pair(overrides={"attention_dropout": 0.0})
    for each in (model, twin):
        for layer in each.model.layers:
            layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj, torch.nn.Dropout(0.3))
        fxopt.restore(each)
    fxopt.optimize(model)
    fxopt.optimize(twin, cuda_graphs="off")
    batch = tools.make_batch((2, 24), padded="none", device="cuda")
    drawn: list[list[torch.Tensor]] = []
    for each in (model, twin):
        torch.manual_seed(0)
        drawn.append([])
        for _ in range(2 * RECORDING):
            each.zero_grad()
            loss = each(**batch).loss
            loss.backward()
            drawn[-1].append(loss.detach())
    assert len({float(loss) for loss in drawn[0]}) == 2 * RECORDING
    assert all(torch.equal(*losses) for losses in zip(*drawn, strict=True))


def test_checkpointed_blocks_and_saving_on_the_cpu(pair, tools):
    model, twin = pair(memory_budget=None)
    batch = tools.make_batch((2, 24), padded="none", device="cuda")
    for each in (model, twin):
        each.gradient_checkpointing_enable()
    for _ in range(RECORDING):
        for each in (model, twin):
            each.zero_grad()
            each(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad)
    for each in (model, twin):
        each.gradient_checkpointing_disable()
    for _ in range(RECORDING):
        for each in (model, twin):
            each.zero_grad()
            with torch.autograd.graph.save_on_cpu():
                each(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad)


def test_a_failing_call_leaves_the_next_ones_right(pair, tools):
    model, twin = pair()
    batch = tools.make_batch((2, 24), padded="none", device="cuda")
    bad = {**batch, "labels": batch["labels"][:, :-1]}
    for step in range(2 * RECORDING):
        for each in (model, twin):
            each.zero_grad()
            if step % 2:
                with pytest.raises(Exception):  # noqa: B017
                    each(**bad)
            each(**batch).loss.backward()
        assert_equal(model, twin)


def test_memory_stays_what_it_was(pair, tools):
    model, _ = pair()
    batch = tools.make_batch((4, 64), padded="none", device="cuda")
    sizes = []
    for _ in range(12):
        model.zero_grad()
        model(**batch).loss.backward()
        torch.cuda.synchronize()
        sizes.append(torch.cuda.memory_reserved())
    assert sizes[-1] == sizes[RECORDING]


def test_copies_and_restored_models_are_stock(pair, tools):
    model, _ = pair()
    batch = tools.make_batch((2, 24), padded="none", device="cuda")
    for _ in range(RECORDING):
        model(**batch).loss.backward()
    twin = copy.deepcopy(model)
    fxopt.restore(model)
    for each in (model, twin):
        each.zero_grad()
        each(**batch).loss.backward()
    assert_equal(model, twin)
