"""ZeRO-3 without DeepSpeed: hooks of its kinds, by a module of its name, on every module of a tiny model.

`tests/distributed/test_others.py` has DeepSpeed itself, where it is installed.
"""

from __future__ import annotations

import copy
import functools
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt
from fxopt.capture import deepspeed_private, zero
from fxopt.capture.engines import Sharding
from fxopt.capture.hooks import find_hooks
from fxopt.capture.installation import find_installation

TINY = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=64,
    head_dim=8,
)
IDS = torch.arange(24).reshape(2, 12)
ENGINE = """
import torch

def gather(module):
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.whole

def free(module):
    for parameter in module.parameters(recurse=False):
        parameter.data = torch.empty(0)

class Before(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module, value):
        ctx.module = module
        return value.detach()

    @staticmethod
    def backward(ctx, gradient):
        gather(ctx.module)
        return None, gradient

class After(Before):
    @staticmethod
    def backward(ctx, gradient):
        free(ctx.module)
        return None, gradient

def apply(function, module, value):
    if isinstance(value, torch.Tensor):
        return function.apply(module, value)
    return type(value)(apply(function, module, each) for each in value) if isinstance(value, tuple) else value

def follow(module, wrapped):
    for parameter in module.parameters(recurse=False):
        parameter.whole, parameter.ds_shape, parameter.ds_process_group = parameter.data, parameter.shape, None

    def fetch(module, given):
        gather(module)

    def release(module, given, output):
        free(module)

    module.register_forward_pre_hook(wrapped(fetch))
    module.register_forward_hook(release)
    module.register_forward_hook(lambda module, given, output: apply(Before, module, output))
    module.register_forward_pre_hook(lambda module, given: apply(After, module, given))
    free(module)
"""


@pytest.fixture
def engine(monkeypatch):
    module = types.ModuleType(deepspeed_private.MODULE_HOOKS)
    exec(ENGINE, vars(module))
    monkeypatch.setitem(sys.modules, deepspeed_private.MODULE_HOOKS, module)
    return module


def disabled(function):
    """Wrap `function` as torch and DeepSpeed wrap hooks."""

    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    wrapper.__module__ = "torch._dynamo.eval_frame"
    return wrapper


def followed(engine, model):
    for module in model.modules():
        engine.follow(module, disabled)
    return model


def step(model):
    loss = model(input_ids=IDS, labels=IDS).loss
    whole = [name for name, parameter in model.named_parameters() if parameter.numel()]
    loss.backward()
    return loss.detach(), whole, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("order", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_blocks_and_head_are_rewritten_where_hooks_gather_each_module(order, engine):
    stock = LlamaForCausalLM(LlamaConfig(**TINY)).train()
    model = copy.deepcopy(stock)
    if order == "before":
        fxopt.optimize(model)
    followed(engine, model)
    if order == "after":
        fxopt.optimize(model)
    for _ in range(2):
        loss, whole, found = step(model)
        expected_loss, _, expected = step(stock)
        assert whole == [], "nothing is left gathered between forward and backward"
        torch.testing.assert_close(loss, expected_loss)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    installation = find_installation(model)
    assert not installation.ledger.fallbacks
    report = fxopt.explain(model)
    assert {site.status for site in report.sites} == {"rewritten"}
    assert sum(site.count for site in report.sites) == 14


def test_a_users_hook_is_told_from_the_engines(engine):
    model = fxopt.optimize(LlamaForCausalLM(LlamaConfig(**TINY)).train(), verify="off")
    followed(engine, model)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    stock = LlamaForCausalLM(LlamaConfig(**TINY)).train()
    for own, parameter in zip(stock.parameters(), model.parameters(), strict=True):
        own.data = parameter.whole.clone()
    _, _, found = step(model)
    _, _, expected = step(stock)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    fallbacks = find_installation(model).ledger.fallbacks
    assert {reason.partition("; at ")[0] for _, reason in fallbacks} == {
        "a hook sits on the LlamaMLP inside: calls of this block run stock",
        "a hook sits on a LlamaMLP of a block and may keep what the forward reads: "
        "the calls run stock around the compiled blocks",
    }


@pytest.mark.parametrize("place", range(2))
@pytest.mark.parametrize("first", ["users", "engines"])
def test_a_users_hook_does_not_hide_that_the_engine_gathers(place, first, engine):
    """Wherever it sits: a rank that does not gather as the others do gathers in another order."""
    block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    if first == "engines":
        followed(engine, block)
    block[place].register_forward_hook(lambda *_: None)
    if first == "users":
        followed(engine, block)
    hooks = find_hooks(block)
    assert hooks.live is block[place]
    assert hooks.gathers


def test_parameters_around_the_blocks_leave_the_head_stock(engine):
    model = fxopt.optimize(LlamaForCausalLM(LlamaConfig(**TINY)).train(), verify="off")
    model.scale = nn.Parameter(torch.ones(()))
    followed(engine, model)
    step(model)
    (reason,) = [why for region, why in find_installation(model).ledger.fallbacks if region == "(model)"]
    assert reason.startswith(
        "the LlamaForCausalLM around the blocks has parameters of its own, which ZeRO-3 gathers"
    )


def test_a_linear_that_somebody_put_in_the_place_of_torchs_is_back_after_a_call(engine, monkeypatch):
    linear = types.ModuleType(deepspeed_private.LINEAR)
    linear.zero3_linear_wrap = lambda x, weight, bias=None: (
        x.matmul(weight.t()) + (0 if bias is None else bias)
    )
    monkeypatch.setitem(sys.modules, deepspeed_private.LINEAR, linear)
    monkeypatch.setattr(F, "linear", linear.zero3_linear_wrap)
    model = followed(engine, fxopt.optimize(LlamaForCausalLM(LlamaConfig(**TINY)).train(), verify="off"))
    step(model)
    assert F.linear is linear.zero3_linear_wrap
    assert "linear_cross_entropy" in {site.op for site in fxopt.explain(model).sites}


@pytest.mark.slow
def test_a_model_of_its_own_is_served_where_deepspeed_has_put_its_linear_for_another(monkeypatch):
    """DeepSpeed puts it there for the length of the process."""
    linear = types.ModuleType(deepspeed_private.LINEAR)
    linear.zero3_linear_wrap = lambda x, weight, bias=None: (
        x.matmul(weight.t()) + (0 if bias is None else bias)
    )
    monkeypatch.setitem(sys.modules, deepspeed_private.LINEAR, linear)
    monkeypatch.setattr(F, "linear", linear.zero3_linear_wrap)
    stock = LlamaForCausalLM(LlamaConfig(**TINY)).train()
    model = fxopt.optimize(copy.deepcopy(stock), verify="off")
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert F.linear is linear.zero3_linear_wrap
    expected = stock(input_ids=IDS, labels=IDS).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    report = fxopt.explain(model)
    assert not report.fallbacks
    assert "linear_cross_entropy" in {site.op for site in report.sites}


def test_a_rank_that_runs_out_of_memory_does_not_gather_again(engine, monkeypatch):
    """The other ranks would not: a collective of one rank alone never ends."""
    model = LlamaForCausalLM(LlamaConfig(**TINY)).train()
    followed(engine, fxopt.optimize(model, verify="off", memory_budget=None))
    calls = find_installation(model)._calls["model.layers"]
    tried = []

    def failing(path, *_):
        tried.append(path)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(calls, "_run", failing)
    with pytest.raises(torch.OutOfMemoryError) as error:
        step(model)
    assert tried == ["model.layers.0"]
    (note,) = error.value.__notes__
    assert "not run again, since its parameters are gathered from all ranks" in note


def whole_in(model):
    return [name for name, parameter in model.named_parameters() if parameter.numel()]


def test_what_was_gathered_is_freed_where_gathering_the_next_fails(engine):
    model = followed(engine, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    gatherings = zero.find_gatherings(model)
    del model[1].weight.whole
    with pytest.raises(AttributeError, match="whole"), zero.gathered(gatherings):
        pass
    assert whole_in(model) == []


def test_what_was_gathered_for_the_tail_is_freed_where_it_fails(engine):
    block, head = nn.Linear(2, 2), nn.Linear(2, 2)
    model = followed(engine, nn.Sequential(block, head))
    sharding = Sharding(model, frozenset([block]), [model])
    seen = []

    def fail(value):
        seen.extend(whole_in(model))
        raise ValueError("of the tail")

    with sharding.gathered(), pytest.raises(ValueError, match="of the tail"):
        sharding.run([head], [torch.ones(1, 2, requires_grad=True)], fail)
    assert seen == ["1.weight", "1.bias"]
    assert whole_in(model) == []


def test_an_error_while_an_engine_is_looked_for_does_not_lock_the_model(engine, monkeypatch):
    model = LlamaForCausalLM(LlamaConfig(**TINY)).train()
    followed(engine, fxopt.optimize(model, verify="off"))
    sharding = find_installation(model).model_call._sharding

    def fail():
        raise ValueError("of the engine")

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "find_gatherings", fail)
        with pytest.raises(ValueError, match="of the engine"):
            step(model)
    step(model)
    assert not find_installation(model).ledger.fallbacks


def test_a_hook_is_told_whose_closure_holds_itself_and_a_variable_that_nothing_is_in(engine):
    def make(inner):
        def function(*args):
            return wrapper, missing, inner(*args)

        function.__module__ = "torch"
        wrapper = disabled(function)
        if inner is None:
            missing = 0
        return wrapper

    assert not zero.is_zero_hook(make(len))
    assert zero.is_zero_hook(make(engine.gather))


class Group:
    """As a process group of so many ranks."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks

    def size(self) -> int:
        return self.num_ranks


def test_ranks_are_those_of_the_largest_group_that_shares_a_parameter():
    """The first parameter may be an expert's, which fewer ranks share than all others."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    few, all_of_them = Group(2), Group(4)
    for layer, group in zip(model, (few, all_of_them), strict=True):
        for parameter in layer.parameters():
            setattr(parameter, deepspeed_private.GROUPS[0], group)
    assert deepspeed_private.group_of(model) is all_of_them
    assert deepspeed_private.group_of(nn.Linear(2, 2)) is None
