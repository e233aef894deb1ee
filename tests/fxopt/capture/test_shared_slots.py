"""Layers that share a slot of the key/value cache read it in training: results stay those of stock with the cache."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

import fxopt
from fxopt.capture import model_call
from fxopt.capture.engines import Sharding
from fxopt.capture.shared_slots import SharedSlots, find_layers, find_suspects
from fxopt.coverage.shrink import tiny_config
from fxopt.report.records import MODEL_REGION

IDS = torch.randint(1, 256, (2, 12), generator=torch.Generator().manual_seed(5))


class ValueHead(nn.Module):
    """A language model within another module, which is what is trained."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.value = nn.Linear(model.config.hidden_size, 1)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **given: Any) -> torch.Tensor:
        output = self.model(input_ids=input_ids, labels=labels, output_hidden_states=True, **given)
        return output.loss + self.value(output.hidden_states[-1]).square().mean()


def share(model: Any, how: str) -> Any:
    """Have the last layer of `model` stand where another one does in a cache, or as the same module twice."""
    layers = model.model.layers
    first, length = layers[0], len(layers)
    if how == "copy":
        layers[length - 1] = copy.deepcopy(first)
    elif how == "all":
        for index in range(1, length):
            layers[index] = copy.deepcopy(first)
    elif how == "appended":
        layers.append(copy.deepcopy(first))
        model.config.num_hidden_layers += 1
        model.config.layer_types = None
    elif how == "module":
        layers[length - 1] = first
    elif how == "numbered":
        layers[length - 1] = copy.deepcopy(first)
        for number, module in enumerate(model.modules()):  # as engines do
            module.number = number
    elif how == "attention":
        layers[length - 1].self_attn = first.self_attn
    return model


def outcome_of(call: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    """Return what a call gives, or how it fails: transformers 5.17 cannot decode with two layers in one slot."""
    try:
        return call(*args, **kwargs).tolist()
    except RuntimeError as error:
        if not transformers.__version__.startswith("5.17."):
            raise
        return str(error)


def loss_of(model: Any, **given: Any) -> torch.Tensor:
    output = model(input_ids=IDS, labels=IDS, **given)
    return output if isinstance(output, torch.Tensor) else output.loss


def differs_without_cache(model: Any) -> bool:
    with torch.no_grad():
        return not torch.allclose(loss_of(model), loss_of(model, use_cache=False), rtol=1e-5)


@pytest.fixture
def assert_steps_of_stock() -> Any:
    """Return a function that compares the loss and all gradients of two steps with those of `stock`."""

    def compare(model: Any, stock: Any, **given: Any) -> None:
        for _ in range(2):
            for each in (model, stock):
                each.zero_grad()
                loss_of(each, **given).backward()
            torch.testing.assert_close(loss_of(model, **given), loss_of(stock, **given), rtol=1e-5, atol=0)
            for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
                assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm(), name

    return compare


@pytest.mark.parametrize(
    ("how", "is_within"),
    [
        ("copy", False),
        ("module", True),
        *(
            pytest.param(how, is_within, marks=pytest.mark.slow)
            for how, is_within in (
                *((how, False) for how in ("all", "appended", "module", "attention", "numbered")),
                ("copy", True),
            )
        ),
    ],
)
def test_layers_of_one_slot_train_as_in_stock(how, is_within, build, assert_steps_of_stock):
    model = share(build(), how)
    assert differs_without_cache(model)
    model = ValueHead(model) if is_within else model
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    assert_steps_of_stock(model, stock)
    reasons = [each.reason for each in fxopt.explain(model).fallbacks if each.region == MODEL_REGION]
    assert any("share a slot of the key/value cache and attend to" in reason for reason in reasons)
    assert all("use_cache=False" in reason for reason in reasons)


@pytest.mark.parametrize(
    "how",
    [
        "appended",
        pytest.param("module", marks=pytest.mark.exhaustive),
        pytest.param("another list", marks=pytest.mark.slow),
    ],
)
def test_layers_that_come_to_share_a_slot_after_optimize_train_as_in_stock(how, build, assert_steps_of_stock):
    model = build()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    loss_of(model).backward()
    assert fxopt.explain(model).fallbacks == ()
    for each in (model, stock):
        if how == "another list":
            first = each.model.layers[0]
            each.model.layers = nn.ModuleList([first, copy.deepcopy(first)])
        else:
            share(each, how)
    assert differs_without_cache(stock)
    assert_steps_of_stock(model, stock)
    reasons = [each.reason for each in fxopt.explain(model).fallbacks if each.region == MODEL_REGION]
    assert any("share a slot of the key/value cache and attend to" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("how", "by", "is_within"),
    [
        ("copy", "argument", True),
        ("module", "argument", False),
        pytest.param("copy", "config", False, marks=pytest.mark.slow),
        pytest.param("module", "config", True, marks=pytest.mark.slow),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (
                ("copy", "argument", False),
                ("module", "argument", True),
                ("copy", "config", True),
                ("module", "config", False),
            )
        ),
    ],
)
def test_without_a_cache_layers_of_one_slot_are_served(how, by, is_within, build, assert_steps_of_stock):
    model = share(build(), how)
    given = {"use_cache": False} if by == "argument" else {}
    model.config.use_cache = by == "argument"
    model = ValueHead(model) if is_within else model
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    if by == "argument" and is_within:  # that the module hands it on is seen at a first call
        loss_of(model, **given)
        first = fxopt.explain(model).fallbacks
        assert ["no call has shown yet" in each.reason for each in first] == [True]
    else:
        first = ()
    assert_steps_of_stock(model, stock, **given)
    report = fxopt.explain(model)
    assert report.fallbacks == first
    assert {site.status for site in report.sites} == {"rewritten"}


@pytest.mark.parametrize(
    ("reentrant", "how", "is_within"),
    [
        (True, "module", False),
        pytest.param(False, "copy", True, marks=pytest.mark.slow),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in ((False, "copy", False), (True, "copy", True), (False, "module", True))
        ),
    ],
)
def test_layers_of_one_slot_train_as_in_stock_whether_checkpointed_or_not(
    reentrant, how, is_within, build, assert_steps_of_stock
):
    """Under checkpointing, stock drops the cache itself: one kind of call says nothing of the other."""
    inner = share(build(), how)
    model = ValueHead(inner) if is_within else inner
    stock = copy.deepcopy(model)
    fxopt.optimize(model)

    def switch(to: bool) -> None:
        for each in (inner, stock.model if is_within else stock):
            if to:
                each.gradient_checkpointing_enable({"use_reentrant": reentrant})
                each.enable_input_require_grads()
            else:
                each.gradient_checkpointing_disable()
                each.disable_input_require_grads()

    for to in (True, False, True):
        switch(to)
        assert_steps_of_stock(model, stock)


def test_evaluation_and_generation_are_left_alone(build):
    model = share(build(), "copy")
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    loss_of(model).backward()
    for each in (model, stock):
        each.eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, stock(IDS).logits)
    given = dict(max_new_tokens=4, do_sample=False)
    assert outcome_of(model.generate, IDS, **given) == outcome_of(stock.generate, IDS, **given)


@pytest.mark.parametrize("arch", [pytest.param("llama", marks=pytest.mark.slow), "gemma2"])
def test_layers_with_slots_of_their_own_are_served(arch, build, assert_steps_of_stock):
    model = build(arch)
    assert not find_suspects(find_layers(model))
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    assert_steps_of_stock(model, stock)
    assert fxopt.explain(model).fallbacks == ()


@pytest.mark.slow
def test_layers_without_a_slot_are_served_after_one_call(assert_steps_of_stock):
    """Layers of recurrences have no number that tells them apart, and put nothing into the cache."""
    torch.manual_seed(0)
    config = tiny_config("recurrent_gemma")
    config.use_cache = True
    model = AutoModelForCausalLM.from_config(config).train()
    assert find_suspects(find_layers(model)).keys() == {"model.layers"}
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    loss_of(model).backward()
    first = fxopt.explain(model).fallbacks
    assert sum(each.count for each in first if each.region == MODEL_REGION) == 1
    assert_steps_of_stock(model, stock)
    again = [each for each in fxopt.explain(model).fallbacks if each not in first]
    assert not any("cache" in each.reason or "Cache" in each.reason for each in again)


def test_ranks_that_gather_together_never_go_different_ways(monkeypatch):
    """What one rank's calls have shown is not known to the others, which may have dropped other layers."""

    def call_gathered(model: Any, outside: Any, run: Any, args: Any, kwargs: Any) -> Any:
        return model.forward(*args, **kwargs)

    torch.manual_seed(0)
    config = tiny_config("recurrent_gemma")
    config.use_cache = True
    model = AutoModelForCausalLM.from_config(config).train()
    fxopt.optimize(model)
    monkeypatch.setattr(Sharding, "find_gatherings", lambda self: ["the model"])
    monkeypatch.setattr(model_call, "call_model_gathered", call_gathered)
    for _ in range(3):
        loss_of(model).backward()
    fallbacks = fxopt.explain(model).fallbacks
    reasons = {each.reason: each.count for each in fallbacks if each.region == MODEL_REGION}
    assert sorted(reasons.values()) == [1, 2]
    assert any("calls of other ranks, which gather parameters with this one" in reason for reason in reasons)
    assert all("use_cache=False" in reason for reason in reasons)


@pytest.mark.parametrize("how", [pytest.param("copy", marks=pytest.mark.slow), "module"])
def test_a_cache_that_is_asked_for_is_kept(how, build, assert_steps_of_stock):
    model = share(build(), how)
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    assert_steps_of_stock(model, stock, use_cache=True)
    output = model(input_ids=IDS, labels=IDS, use_cache=True)
    assert output.past_key_values.get_seq_length() > 0


@pytest.mark.slow
def test_blocks_that_share_weights_under_slots_of_their_own_train_as_in_stock(assert_steps_of_stock):
    torch.manual_seed(0)
    config = tiny_config("zamba2")
    config.use_cache = True
    model = AutoModelForCausalLM.from_config(config).train()
    assert not find_suspects(find_layers(model))
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    assert_steps_of_stock(model, stock)


def test_a_layer_that_is_dropped_at_times_leaves_the_question_open(build, assert_steps_of_stock):
    """The copy is not called at the first step, so that this one shows nothing."""
    model = share(build(), "copy")
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    copied, copied_in_stock = (each.model.layers[-1] for each in (model, stock))
    for each in (model, stock):
        del each.model.layers[-1]
        each.config.num_hidden_layers -= 1
    loss_of(model).backward()
    for each, layer in ((model, copied), (stock, copied_in_stock)):
        each.model.layers.append(layer)
        each.config.num_hidden_layers += 1
    assert_steps_of_stock(model, stock)


class Adding(nn.Module):
    """A layer that keeps a sum in the cache, in a tensor of its own or of all."""

    def __init__(self, place: int | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.inner = nn.Linear(2, 2)
        self.place = place

    def forward(self, x: torch.Tensor, past_key_values: Any) -> torch.Tensor:
        sums = past_key_values.sums
        key = self.place or str(len(sums))
        sums[key] = sums[key].add_(x.detach()) if key in sums else x.detach().clone()
        return self.inner(x) * self.weight


def call_watched(slots: SharedSlots, layers: list[nn.Module], cache: Any) -> str:
    """Call `layers` with `cache`, and return why later calls run stock, nothing where none do."""
    x = torch.ones(2)
    with slots.watched({}):
        for layer in layers:
            x = layer(x, past_key_values=cache)
    return slots.find_obstacle({}) or ""


def make_cache(kind: type = DynamicCache) -> Any:
    cache = kind()
    cache.sums = {}
    return cache


@pytest.mark.parametrize("place", [1, None])
def test_writes_in_place_are_seen(place):
    model = nn.Sequential(Adding(place), Adding(place))
    slots = SharedSlots(model)
    assert "no call has shown yet" in str(slots.find_obstacle({}))
    reason = call_watched(slots, list(model), make_cache())
    assert ("attend to each other's keys" in reason) == (place is not None)


def test_calls_that_drop_layers_settle_once_any_two_have_run_in_one_call():
    model = nn.Sequential(*(Adding(None) for _ in range(3)))
    first, second, third = model
    slots = SharedSlots(model)
    for layers in ([first], [second, third], [], [first, second]):
        assert "no call has shown yet" in call_watched(slots, layers, make_cache())
    assert call_watched(slots, [first, third], make_cache()) == ""


def test_calls_that_drop_layers_show_two_of_one_slot_when_both_have_run():
    model = nn.Sequential(*(Adding(1) for _ in range(2)))
    first, second = model
    slots = SharedSlots(model)
    for layer in (first, second):
        assert "no call has shown yet" in call_watched(slots, [layer], make_cache())
    assert "attend to each other's keys" in call_watched(slots, [first, second], make_cache())


def test_what_one_thread_has_shown_stays_when_a_call_of_another_ends():
    model = nn.Sequential(Adding(1), Adding(1))
    slots = SharedSlots(model)
    with slots.watched({}):
        thread = threading.Thread(target=call_watched, args=(slots, list(model), make_cache()))
        thread.start()
        thread.join()
    assert "attend to each other's keys" in str(slots.find_obstacle({}))


def test_a_layer_that_stands_in_a_list_twice_has_to_run_twice():
    layer = Adding(None)
    model = nn.Sequential(layer, layer)
    slots = SharedSlots(model)
    assert "no call has shown yet" in call_watched(slots, [layer], make_cache())
    assert call_watched(slots, [layer, layer], make_cache()) == ""


class OwnCache:
    """A cache as remote code has it."""


@pytest.mark.parametrize("place", [1, None])
def test_a_cache_of_another_kind_leaves_the_question_open(place):
    model = nn.Sequential(Adding(place), Adding(place))
    slots = SharedSlots(model)
    assert "given OwnCache, expected a transformers.Cache" in call_watched(
        slots, list(model), make_cache(OwnCache)
    )
    x = torch.ones(2)
    with slots.watched({}):
        for layer in model:
            layer(x, make_cache(OwnCache))
    assert "given OwnCache" in str(slots.find_obstacle({}))


def test_before_a_training_call_the_report_tells_what_one_will_show(build):
    report = fxopt.explain(share(build(), "copy"))
    assert {site.status for site in report.sites} == {"rewritten"}
    assert report.fallbacks == ()
    [note] = [note for note in report.notes if "may share a slot of the key/value cache" in note]
    assert "model.layers" in note
    assert "use_cache=False" in note
    assert not any("share a slot" in note for note in fxopt.explain(build()).notes)
    without = fxopt.explain(
        share(build(), "copy"), example_inputs={"input_ids": IDS, "labels": IDS, "use_cache": False}
    )
    assert not any("share a slot" in note for note in without.notes)
