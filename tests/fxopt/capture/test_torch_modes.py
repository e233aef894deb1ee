"""Fails in plain words when a torch version moves something private of its modes that fxopt touches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.capture import torch_modes

IDS = torch.randint(1, 256, (2, 16), generator=torch.Generator().manual_seed(0))


class Passing(TorchDispatchMode):
    """Sees each op, changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def differentiate(function: Callable[[torch.Tensor], Any], x: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda value: function(value).sum())(x)


def push_forward(function: Callable[[torch.Tensor], Any], x: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        assert result is not None
        return result.detach()


def see(function: Callable[[torch.Tensor], Any], x: torch.Tensor) -> torch.Tensor:
    with Passing():
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x).sum(), x)
        return gradient


MODES = {"TorchDispatchMode": see, r"torch\.func": differentiate, "forward_ad": push_forward}


@contextmanager
def checked(name: str) -> Iterator[None]:
    assert torch_modes.find_mode() is None
    yield
    assert torch_modes.find_mode() is None, f"{name} has left its mode on"


@pytest.mark.parametrize("name", MODES)
def test_modes_are_seen_while_they_last(name: str) -> None:
    seen: list[str | None] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_modes.find_mode())
        return x * 2

    with checked(name):
        MODES[name](note, torch.ones(3))
    assert [text for text in seen if text is None or name.replace("\\", "") not in text] == []
    assert seen, f"torch runs {name} otherwise"


@pytest.mark.parametrize(
    ("name", "is_warm"),
    [
        ("TorchDispatchMode", False),
        (r"torch\.func", True),
        pytest.param("forward_ad", False, marks=pytest.mark.slow),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (("TorchDispatchMode", True), (r"torch\.func", False), ("forward_ad", True))
        ),
    ],
)
def test_calls_under_a_mode_are_stocks_and_later_ones_are_served(
    twins, install, assert_same_step, name: str, is_warm: bool
) -> None:
    model, stock = twins(attn_implementation="eager")
    installation = install(model)
    if is_warm:
        assert_same_step(model, stock)
    embedded = model.get_input_embeddings()(IDS).detach()
    results = [
        MODES[name](lambda x, each=each: each(inputs_embeds=x, labels=IDS).loss, embedded)
        for each in (model, stock)
    ]
    assert torch.equal(*results)
    assert results[0].any()
    told = dict(installation.ledger.fallbacks)
    assert {region for region, _ in told} == {"(model)", "model.layers"}
    assert [reason for _, reason in told if name.replace("\\", "") not in reason] == []
    assert_same_step(model, stock)
    assert dict(installation.ledger.fallbacks) == told, "a call without a mode runs stock"
    assert not installation.ledger.refused


@pytest.mark.parametrize(
    "enter",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved),
        lambda: torch.device("meta"),
        Passing,
    ],
)
def test_what_surrounds_a_call_is_told_and_what_was_left_is_not(enter: Callable[[], Any]) -> None:
    before = torch_modes.find_around()
    with enter():
        assert torch_modes.find_around() != before, "torch moved what find_around reads"
    assert torch_modes.find_around() == before
