"""A module called as stock does, hooks and all, with another forward in place of its own or more gathered for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fxopt.capture import torch_modules, torch_tensors, zero
from fxopt.capture.hooks import hooks_hidden
from fxopt.capture.modules import walk


def call_with_forward(
    module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call `module` as stock does, hooks and all, with `forward` in place of its own for this call."""
    had = "forward" in module.__dict__
    previous = module.__dict__.get("forward")
    state = {"inside": False}

    def swapped(*inner_args: Any, **inner_kwargs: Any) -> Any:
        # The module's own forward is back while it runs, so that captures and nested calls see it.
        _restore(module, had, previous)
        state["inside"] = True
        return forward(*inner_args, **inner_kwargs)

    module.__dict__["forward"] = swapped
    try:
        return torch_modules.stock_call(module, *args, **kwargs)
    finally:
        if not state["inside"]:
            _restore(module, had, previous)


def _restore(module: nn.Module, had: bool, previous: Any) -> None:
    if had:
        module.__dict__["forward"] = previous
    else:
        module.__dict__.pop("forward", None)


def run_gathered(block: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what `run` does with the parameters inside `block` gathered by ZeRO-3, all at once."""
    again = torch_tensors.is_in_backward()  # what the first forward returned has gathered them for backward
    inner = [module for module in walk(block) if again or module is not block]
    gatherings = [
        each
        for each in zero.find_gatherings(inner)
        if each.has_parameters and not (again and each.is_gathered)
    ]
    with hooks_hidden(inner, zero.is_zero_hook), zero.gathered(gatherings):
        args, kwargs = zero.wrap_inputs(gatherings, (args, kwargs))
        return zero.wrap_outputs(gatherings, run(*args, **kwargs))


def run_captured(block: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what `run` does as `run_gathered` has it, where it captures or runs a capture."""
    with zero.linear_put(zero.captured_linear()):
        return run_gathered(block, run, *args, **kwargs)


def call_with_gathered(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a block as stock does, but for `run_gathered`."""
    return call_with_forward(block, functools.partial(run_gathered, block, block.forward), args, kwargs)


def call_model_gathered(
    model: nn.Module,
    outside: Iterable[zero.Gathering],
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a model as stock does, with `forward` and with the parameters `outside` its blocks gathered by ZeRO-3.

    Modules there without parameters of their own are not followed: one of them may be left before its end.
    """
    read = [each for each in outside if each.has_parameters]
    idle = [each for each in outside if not each.has_parameters]
    following = {hook for each in idle for hook in (*each.before, *each.after)}

    def run(*inner_args: Any, **inner_kwargs: Any) -> Any:
        with zero.gathered(read):
            return forward(*inner_args, **inner_kwargs)

    with hooks_hidden([each.module for each in idle], following.__contains__):
        return call_with_forward(model, run, args, kwargs)


def run_uncaptured(
    model: nn.Module, outside: Iterable[zero.Gathering], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return what the forward of `model` does where nothing of it is captured, `outside` being gathered by ZeRO-3.

    A module there that is not called may have its parameters read by the model itself, as losses that are fused
    with a head do: they are gathered for the backward pass too. ZeRO-3 keeps them until the next forward or step.
    """
    read = [each for each in outside if each.has_parameters]
    called: set[nn.Module] = set()
    handles = [each.module.register_forward_pre_hook(lambda module, _: called.add(module)) for each in read]
    try:
        output = model.forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return zero.wrap_outputs([each for each in read if each.module not in called], output)
