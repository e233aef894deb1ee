"""Hooks inside a module, found anew at each call whatever was changed since the last one."""

from __future__ import annotations

import collections
from typing import Any

import pytest
from torch import nn

from fxopt.capture.hooks import Hooks, InnerHooks, find_hooks


def hook(*_: Any) -> None:
    return None


def make() -> Any:
    block: Any = nn.Module()
    block.attention = nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)})
    block.mlp = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.GELU(), nn.Linear(2, 2)))
    block.register_module("gone", None)
    return block


def put_on(module: nn.Module) -> None:
    module.register_forward_hook(hook)


def put_into_another_dictionary(module: nn.Module) -> None:
    module._forward_hooks = collections.OrderedDict({7: hook})


def put_on_backward(module: nn.Module) -> None:
    module.register_full_backward_pre_hook(hook)


@pytest.mark.parametrize("put", [put_on, put_into_another_dictionary, put_on_backward])
@pytest.mark.parametrize("path", ["attention.q", "mlp", "mlp.1.1"])
def test_a_hook_put_anywhere_inside_is_found_at_the_next_call(put: Any, path: str) -> None:
    block = make()
    inner = InnerHooks(block)
    assert inner.find() == Hooks(None, False)
    put(block.get_submodule(path))
    assert inner.find() == find_hooks(block) == Hooks(block.get_submodule(path), False)


def test_a_hook_that_is_gone_is_not_found() -> None:
    block = make()
    inner = InnerHooks(block)
    handle = block.mlp[0].register_forward_hook(hook)
    assert inner.find().live is block.mlp[0]
    handle.remove()
    assert inner.find() == Hooks(None, False)


def test_modules_that_bring_their_hooks_are_found() -> None:
    block = make()
    inner = InnerHooks(block)
    inner.find()
    other: Any = nn.Sequential(nn.Linear(2, 2))
    other[0].register_forward_hook(hook)
    block.mlp[1][0] = other  # in place of another
    assert inner.find().live is other[0]
    block.mlp[1][0] = nn.GELU()
    assert inner.find().live is None
    block.attention["v"] = other  # one more
    assert inner.find().live is other[0]


def test_a_hook_on_the_module_itself_is_not_inside() -> None:
    block = make()
    block.register_forward_hook(hook)
    assert InnerHooks(block).find() == Hooks(None, False)
