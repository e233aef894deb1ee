"""What is private of `nn.Module`: its compile slot, the dictionaries of its hooks, children and tensors.

`tests/fxopt/capture/test_torch_modules.py` fails in plain words when a torch version moves one of these.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo as dynamo
from torch.nn.modules import module as nn_module

SLOT = "_compiled_call_impl"
"""Where `module.compile()` keeps what `module(...)` runs in place of `stock_call`; copies and pickles drop it."""

CALL = "_call_impl"
"""The method that `stock_call` is; where a module has its own, Dynamo goes through the slot."""

CALLER = "_wrapped_call_impl"
"""The code that reads the slot."""

FORWARD_HOOK_DICTS = ("_forward_pre_hooks", "_forward_hooks")

HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The hook dictionaries of a module that `Module._call_impl` looks at."""

TENSOR_DICTS = ("_parameters", "_buffers")
"""The dictionaries of a module's own tensors."""

CHILDREN = "_modules"
"""The dictionary of the modules right inside a module."""

stock_call = torch.nn.Module._call_impl
"""What `module(...)` runs when nothing is installed: hooks and `forward`."""


@contextlib.contextmanager
def called_by(module: torch.nn.Module, entry: Callable[..., Any]) -> Iterator[None]:
    """Make calls of `module` run `entry` within the scope; Dynamo traces it, not the forward."""
    before = {name: module.__dict__[name] for name in (SLOT, CALL) if name in module.__dict__}
    module.__dict__[SLOT] = entry
    module.__dict__[CALL] = functools.partial(stock_call, module)
    try:
        yield
    finally:
        for name in (SLOT, CALL):
            module.__dict__.pop(name, None)
        module.__dict__.update(before)


def forward_of(kind: type) -> Any:
    """Return the forward of a class of modules as it stands there: TorchScript's classes fail when they are asked."""
    return inspect.getattr_static(kind, "forward", None)


def children_of(module: torch.nn.Module) -> dict[str, torch.nn.Module | None]:
    """Return the modules right inside `module` by name, without the generator that `named_children` is."""
    return module._modules


def find_buffers(module: torch.nn.Module) -> list[dict[str, torch.Tensor | None]]:
    """Return where the modules in `module` that have buffers keep them: the dictionaries themselves."""
    return [inner._buffers for inner in module.modules() if inner._buffers]


def own_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters of `module` itself, without the generators that `parameters` is."""
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def own_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield the parameters and buffers of `module` itself."""
    for own in (module._parameters, module._buffers):
        yield from (value for value in own.values() if value is not None)


@contextlib.contextmanager
def parameters_in_plain_dicts(module: torch.nn.Module) -> Iterator[None]:
    """Keep the parameters in `module` in plain dictionaries within the scope, whatever keeps them else."""
    kept = {inner: inner._parameters for inner in module.modules()}
    for inner, parameters in kept.items():
        inner.__dict__["_parameters"] = dict(parameters.items())
    try:
        yield
    finally:
        for inner, parameters in kept.items():
            inner.__dict__["_parameters"] = parameters


def carries_hooks(module: torch.nn.Module) -> bool:
    """Return whether any hook, idle ones too, is on `module` itself."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    """Return whether hooks for all modules of the process are registered."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


OptimizedModule = dynamo.OptimizedModule
"""What torch.compile wraps around a module."""
