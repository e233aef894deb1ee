"""A block's modules once more, with other tensors in them: what runs changes nothing that other threads may run.

Containers are copied, so that what a block puts into one is not kept, and so are methods and partials that hold modules
of the block, with the copies in their places. A module that plain objects or closures hold is the block's own there.
"""

from __future__ import annotations

import collections
import copy
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fxopt.capture import torch_modules

CONTAINERS = (dict, list, set, collections.OrderedDict, collections.defaultdict, collections.deque)
"""What is copied in any case: of other classes only what holds a module."""
ATOMS = (str, bytes, int, float, bool, type(None), torch.Tensor, torch.dtype, torch.device)
"""What holds no module, and is met most."""


def shadow_of(block: nn.Module, tensors: Mapping[int, torch.Tensor]) -> nn.Module:
    """Return a module like `block` whose parameters and buffers are `tensors` by the identity of those of `block`.

    Modules inside are new, each once, however many names it has; those of TorchScript are the same, and so are objects
    that modules hold. What is installed on them is left out, so that calls run their forward.
    """
    made = {id(module): object.__new__(type(module)) for module in _modules_of(block)}
    copies = _Copies(made)
    for module in _modules_of(block):
        attributes, shadow = dict(module.__dict__), made[id(module)].__dict__
        shadow.update({name: copies.copy_of(value) for name, value in attributes.items()})
        for name in torch_modules.TENSOR_DICTS:
            own = dict(attributes[name].items())
            shadow[name] = {key: tensors.get(id(tensor), tensor) for key, tensor in own.items()}
        for name in (torch_modules.CHILDREN, *torch_modules.HOOK_DICTS):
            if shadow.get(name) is attributes.get(name, ()):  # of its own also where it holds nothing to copy
                shadow[name] = copy.copy(attributes[name])
        for name in (torch_modules.SLOT, torch_modules.CALL):
            shadow.pop(name, None)
    return made[id(block)]


def _modules_of(block: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules in `block`, each once, but for those of TorchScript, whose state is not Python's."""
    seen, queue = {id(block)}, [block]
    for module in queue:
        yield module
        for child in list(torch_modules.children_of(module).values()):
            if child is not None and id(child) not in seen and not isinstance(child, torch.jit.ScriptModule):
                seen.add(id(child))
                queue.append(child)


class _Copies:
    """Values with modules of `made` in the places of theirs, each value once."""

    def __init__(self, made: Mapping[int, nn.Module]) -> None:
        self._made = made
        self._known: dict[int, Any] = {}

    def copy_of(self, value: Any) -> Any:
        """Return `value`, or what stands for it; a container that holds itself holds the old one."""
        if isinstance(value, ATOMS):
            return value
        if isinstance(value, nn.Module):
            return self._made.get(id(value), value)
        if id(value) not in self._known:
            self._known[id(value)] = value
            self._known[id(value)] = self._copy(value)
        return self._known[id(value)]

    def _copy(self, value: Any) -> Any:
        match value:
            case types.MethodType():
                owner = self.copy_of(value.__self__)
                return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
            case functools.partial():
                return self._partial(value)
            case dict() if not isinstance(value, collections.Counter):
                keys, items = list(value), list(value.values())
                new_keys, new = [self.copy_of(key) for key in keys], [self.copy_of(item) for item in items]
                if type(value) not in CONTAINERS and not _differ(new_keys, keys) and not _differ(new, items):
                    return value
                return _refilled(value, list(zip(new_keys, new, strict=True)))
            case list() | set() | collections.deque():
                items = list(value)
                new = [self.copy_of(item) for item in items]
                is_copied = type(value) in CONTAINERS or _differ(new, items)
                return _refilled(value, new) if is_copied else value
            case tuple() | frozenset():
                items = list(value)
                new = [self.copy_of(item) for item in items]
                if not _differ(new, items):
                    return value
                make: Any = getattr(type(value), "_make", type(value))
                return make(new)
            case _:
                return value

    def _partial(self, value: Any) -> Any:
        parts = (value.func, value.args, value.keywords)
        func, args, keywords = (self.copy_of(part) for part in parts)
        if not _differ((func, args, keywords), parts):
            return value
        bound = functools.partial(func, *args, **keywords)
        bound.__dict__.update({name: self.copy_of(item) for name, item in value.__dict__.items()})
        return bound


def _differ(new: Any, old: Any) -> bool:
    return any(a is not b for a, b in zip(new, old, strict=True))


def _refilled(container: Any, items: list[Any]) -> Any:
    """Return a container like `container`, of its class and options, that holds `items`."""
    new = copy.copy(container)
    new.clear()
    fill = new.update if isinstance(new, dict | set) else new.extend
    fill(items)
    return new
