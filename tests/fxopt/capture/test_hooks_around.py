"""Hooks on the modules around the blocks: the trunk runs those before the blocks, any other sends the call to stock."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.report.records import MODEL_REGION

peft: Any = pytest.importorskip("peft")


class WithIdentities(nn.Module):
    """Blocks between two modules that compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 8)
        self.before = nn.Identity()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.after = nn.Identity()
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.before(self.table(input_ids))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.after(x))


def adapted(model: nn.Module) -> Any:
    torch.manual_seed(1)
    options = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, options)


def reasons_of(installation: Any) -> list[str]:
    return [fallback.reason for fallback in installation.ledger.fallback_records()]


@pytest.mark.parametrize(("tied", "when"), [(False, "before the capture"), (True, "after it")])
def test_a_hook_on_the_embedding_fires_once_and_costs_no_tail(
    build, install, assert_same_step, tied, when
) -> None:
    model = build(tie_word_embeddings=tied)
    stock, seen = copy.deepcopy(model), []
    installation = install(model)
    if when == "after it":
        assert_same_step(model, stock)
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    for step in (1, 2):
        assert_same_step(model, stock)
        assert len(seen) == step
    assert not any(isinstance(value, torch._subclasses.FakeTensor) for value in seen)
    assert not reasons_of(installation)


def test_hooks_inside_a_block_see_the_values_of_calls_alone(build, install, assert_same_step) -> None:
    """Not the stand-ins that the form of a block's result is found with."""
    model = build()
    stock = copy.deepcopy(model)
    seen: dict[nn.Module, list[torch.Tensor]] = {model: [], stock: []}
    for each, values in seen.items():
        for layer in each.model.layers:
            layer.mlp.register_forward_pre_hook(
                lambda module, args, values=values: values.append(args[0].detach())
            )
            layer.mlp.register_forward_hook(
                lambda module, args, out, values=values: values.append(out.detach())
            )
    install(model)
    assert_same_step(model, stock)
    for ours, theirs in zip(seen[model], seen[stock], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_hooks_before_the_blocks_change_what_these_get(build, install, assert_same_step) -> None:
    model = build()
    stock = copy.deepcopy(model)
    installation = install(model)
    shapes: list[Any] = []
    for each in (model, stock):
        each.model.embed_tokens.register_forward_hook(lambda module, args, output: output * 0.5)
        each.model.embed_tokens.register_full_backward_hook(lambda m, gi, go: shapes.append(go[0].shape))
    assert_same_step(model, stock)
    assert not reasons_of(installation)
    assert len(shapes) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_adapters_whose_input_is_made_to_require_gradients_keep_their_tail(
    build, install, assert_same_step, tied
) -> None:
    model = adapted(build(tie_word_embeddings=tied))
    stock = copy.deepcopy(model)
    installation = install(model)
    for each in (model, stock):
        each.enable_input_require_grads()
    assert_same_step(model, stock)
    assert not reasons_of(installation)
    assert MODEL_REGION in {capture.region for capture in installation.ledger.captures}


class AskedItsDtype(nn.Module):
    """Blocks between two layers; the forward asks for the dtype as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.norm = nn.RMSNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = next(self.parameters()).dtype
        x = self.before(x.to(dtype))
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).square().mean()


def test_a_model_that_asks_for_its_dtype_has_its_hooks_run_and_its_modules_named() -> None:
    torch.manual_seed(0)
    model = AskedItsDtype().train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    x, losses = torch.randn(4, 8), []
    for each in (model, stock):
        each.before.register_forward_hook(lambda module, args, output: output.requires_grad_(True) * 2)
        losses.append(each(x))
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(model.before.weight.grad, stock.before.weight.grad)
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert [(site.pattern, site.module) for site in report.sites] == [("rms_norm", "norm")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_reentrant", [pytest.param(False, marks=pytest.mark.slow), True])
def test_checkpointed_adapters_get_the_fused_head(build, use_reentrant) -> None:
    model = adapted(build())
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    ids, losses = torch.randint(1, 256, (2, 16)), []
    for each in (model, stock):
        each.enable_input_require_grads()
        each.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        losses.append(each(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        if theirs.requires_grad:
            error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
            assert error < 1e-4, name
    report = fxopt.explain(model)
    assert not report.fallbacks
    assert "linear_cross_entropy" in {site.op for site in report.sites}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("has_adapters", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_hook_on_the_head_added_later_is_obeyed_and_counted(
    build, install, assert_same_step, has_adapters
) -> None:
    """PEFT's model finds its attributes by a method of its own, which changes how Dynamo names its modules."""
    model = adapted(build()) if has_adapters else build()
    stock = copy.deepcopy(model)
    installation = install(model)
    assert_same_step(model, stock)
    for each in (model, stock):
        handle = each.get_output_embeddings().register_forward_hook(lambda module, args, output: output * 2)
    assert_same_step(model, stock)
    (reason,) = reasons_of(installation)
    assert reason.startswith(
        "a hook sits on the Linear, which does not run before the blocks only: "
        "the calls run stock around the compiled blocks; at "
    )
    handle.remove()


class WithTwoNames(WithIdentities):
    """The same, where the model calls its embedding, and again after the blocks if asked, by a second name."""

    def __init__(self, *, is_called_after: bool) -> None:
        super().__init__()
        self.given, self.is_called_after = self.table, is_called_after

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.given(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x + self.table(input_ids) if self.is_called_after else x)


@pytest.mark.parametrize("is_called_after", [False, True])
def test_a_module_of_two_names_stands_where_it_is_called_by_either(install, is_called_after: bool) -> None:
    torch.manual_seed(0)
    model, ids = WithTwoNames(is_called_after=is_called_after), torch.randint(0, 32, (2, 5))
    stock = copy.deepcopy(model)
    installation = install(model)
    for each in (model, stock):
        each.table.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(model(ids), stock(ids))
    told = [
        "a hook sits on the Embedding, which does not run before the blocks only: "
        "the calls run stock around the compiled blocks"
    ]
    assert [reason.split(";")[0] for reason in reasons_of(installation)] == (told if is_called_after else [])


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("early", [False, True])
def test_a_hook_on_a_module_that_computes_nothing_is_obeyed(install, place, early) -> None:
    torch.manual_seed(0)
    model, ids = WithIdentities(), torch.randint(0, 32, (2, 5))
    stock = copy.deepcopy(model)
    installation = install(model)
    if not early:
        assert torch.equal(model(ids), stock(ids))
    for each in (model, stock):
        each.get_submodule(place).register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(model(ids), stock(ids))
    (reason,) = reasons_of(installation)
    told = (
        "a hook sits on the Identity, which does not run before the blocks only: "
        "the calls run stock around the compiled blocks; at "
    )
    assert reason.startswith(f"{told}{place} (test_hooks_around.py:")
