"""A block's modules once more, with other tensors in them: what runs changes nothing that other threads may run."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxopt.capture import torch_modules


def shadow_of(block: nn.Module, tensors: Mapping[int, torch.Tensor]) -> nn.Module:
    """Return a module like `block` whose parameters and buffers are `tensors` by the identity of those of `block`.

    Modules inside are new, each once, however many names it has; whatever else they hold is the same, but for methods
    and containers of the old ones. What is installed on them is left out, so that calls run their forward.
    """
    made = {module: object.__new__(type(module)) for module in block.modules()}
    for module, shadow in made.items():
        shadow.__dict__ = {name: _in_shadow(value, made) for name, value in module.__dict__.items()}
        for name in torch_modules.TENSOR_DICTS:
            own = module.__dict__[name]
            shadow.__dict__[name] = {key: tensors.get(id(tensor), tensor) for key, tensor in own.items()}
        for name in torch_modules.HOOK_DICTS:
            if name in shadow.__dict__:
                shadow.__dict__[name] = type(module.__dict__[name])(module.__dict__[name])
        for name in (torch_modules.SLOT, torch_modules.CALL):
            shadow.__dict__.pop(name, None)
    return made[block]


def _in_shadow(value: Any, made: Mapping[nn.Module, nn.Module]) -> Any:
    """Return `value` with the modules of `made` in the places of theirs: itself where it holds none of these."""
    if isinstance(value, nn.Module):
        return made.get(value, value)
    if isinstance(value, types.MethodType):
        owner = _in_shadow(value.__self__, made)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        func, args, keywords = (_in_shadow(part, made) for part in parts)
        if all(new is old for new, old in zip((func, args, keywords), parts, strict=True)):
            return value
        bound = functools.partial(func, *args, **keywords)
        bound.__dict__.update({name: _in_shadow(item, made) for name, item in value.__dict__.items()})
        return bound
    if type(value) is dict:
        items = {key: _in_shadow(item, made) for key, item in value.items()}
        return items if any(items[key] is not value[key] for key in value) else value
    if type(value) in (list, tuple):
        items = [_in_shadow(item, made) for item in value]
        return type(value)(items) if any(map(_differ, items, value)) else value
    return value


def _differ(new: Any, old: Any) -> bool:
    return new is not old
