"""Tiny models, and an installation that rewrites nothing: capture alone, against stock."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fxopt.capture import torch_lowering
from fxopt.capture.installation import Installation

TINY = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
    pad_token_id=0,
    eos_token_id=2,
)


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """Return a builder of tiny llama models in training mode, all with the same weights."""

    def build_llama(arch: str = "llama", **overrides: Any) -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **{**TINY, **overrides})).train()

    return build_llama


@pytest.fixture
def install() -> Callable[..., Installation]:
    """Return a function that installs capture without any rewriting."""

    def install_capture(model: torch.nn.Module, **options: Any) -> Installation:
        def transform(gm: Any, *, region: str, lazy_outputs: bool) -> None:
            return None

        installation = Installation(
            model, None, transform, torch_lowering.plain_backend, partial=options.get("partial", False)
        )
        installation.install()
        return installation

    return install_capture


@pytest.fixture
def assert_same_step() -> Callable[..., None]:
    """Return a function that runs one training step on both models and compares loss and gradients bit for bit."""

    def compare(
        model: torch.nn.Module, stock: torch.nn.Module, call: Callable[[Any], Any] | None = None
    ) -> None:
        ids = torch.randint(1, 256, (2, 16), generator=torch.Generator().manual_seed(3))
        call = call or (lambda m: m(input_ids=ids, labels=ids).loss)
        losses = []
        for each in (model, stock):
            each.zero_grad()
            torch.manual_seed(7)
            loss = call(each)
            loss.backward()
            losses.append(loss.detach())
        assert torch.equal(*losses)
        compared = 0
        for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
            if theirs.grad is None:
                assert ours.grad is None, name
                continue
            assert ours.grad is not None, name
            assert torch.equal(ours.grad, theirs.grad), name
            compared += 1
        assert compared > 0

    return compare


@pytest.fixture(scope="session")
def twins(build: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """Return a builder of two equal models."""

    def build_twins(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        model = build(*args, **kwargs)
        return model, copy.deepcopy(model)

    return build_twins
