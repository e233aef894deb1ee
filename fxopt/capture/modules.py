"""The modules of a model in one walk: torch's own generators call themselves once per level and item."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn

from fxopt.capture import torch_modules


def walk(model: nn.Module, but: Container[nn.Module] = ()) -> dict[nn.Module, str]:
    """Return `model` and the modules in it with their paths, as `named_modules` does; none of or below `but`.

    >>> list(walk(nn.Sequential(nn.Tanh(), nn.Sequential(nn.ReLU()))).values())
    ['', '0', '1', '1.0']
    """
    found: dict[nn.Module, str] = {}
    stack: list[tuple[str, nn.Module | None]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if module is None or module in found or module in but:
            continue
        found[module] = path
        prefix = f"{path}." if path else ""
        for name, child in reversed(torch_modules.children_of(module).items()):
            stack.append((prefix + name, child))
    return found


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Return `model` and the modules in it by their paths, by all of them where one is held under several names.

    >>> tanh = nn.Tanh()
    >>> list(modules_by_path(nn.Sequential(tanh, nn.Sequential(tanh))))
    ['', '0', '1', '1.0']
    """
    found: dict[str, nn.Module] = {}
    stack: list[tuple[str, nn.Module | None, tuple[nn.Module, ...]]] = [("", model, ())]
    while stack:
        path, module, above = stack.pop()
        if module is None or module in above:
            continue
        found[path] = module
        prefix = f"{path}." if path else ""
        for name, child in reversed(torch_modules.children_of(module).items()):
            stack.append((prefix + name, child, (*above, module)))
    return found


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    """Return the parameters and buffers of `model`, each once, in the order of its modules."""
    found: dict[int, torch.Tensor] = {}
    for module in walk(model):
        for value in torch_modules.own_tensors(module):
            found.setdefault(id(value), value)
    return list(found.values())
