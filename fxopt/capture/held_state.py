"""What a model's modules and the code around them hold, noted so that it can be told whether a call changed it.

Numbers and texts are noted by themselves, tensors by their versions, containers and objects by what is in them, and all
else by identity.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fxopt.capture import torch_modules
from fxopt.capture.modules import walk
from fxopt.capture.torch_tensors import version_of

LIBRARIES = ("builtins", "torch", "transformers", "accelerate", "peft", "fxopt")
"""Whose classes and modules hold nothing that a model's call changes and its results hang on."""
SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
SEQUENCES = (tuple, list, set, frozenset, collections.deque)
OPAQUE = (nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
MOST_LEVELS = 6
MOST_ITEMS = 100_000
"""Of all that is noted of a model: what is reached after these is known by identity alone."""
MOST_ARRAY_BYTES = 2**16


class Held(NamedTuple):
    """What one holder has."""

    name: str
    """How it was first reached."""
    items: dict[str, Any]
    """Notes of its items that have names."""
    others: list[Any]
    """Notes of its other items, in their order."""


def note_value(value: Any, levels: int = MOST_LEVELS) -> Any:
    """Return what is equal as long as `value` is unchanged, and if it is a container, what is in it.

    >>> note_value([1, [2]]) == note_value([1, [2]])  # two lists
    False
    """
    if not levels or not is_container(value):
        return _note(value)
    is_mapping = issubclass(type(value), dict)
    items = itertools.chain.from_iterable(dict.items(value)) if is_mapping else value
    noted = [note_value(item, levels - 1) for item in itertools.islice(items, MOST_ITEMS)]
    return None if type(value) is tuple else id(value), noted


def _note(value: Any) -> Any:
    if type(value) in SCALARS:
        return type(value), value
    if isinstance(value, torch.Tensor):
        return id(value), None if value.is_inference() else version_of(value)
    if type(value).__name__ == "ndarray" and value.nbytes <= MOST_ARRAY_BYTES:
        return id(value), hash(value.tobytes())
    return id(value)


def is_container(value: Any) -> bool:
    """Return whether `note_value` notes what is in `value`."""
    return issubclass(type(value), (dict, *SEQUENCES))


def note_held(model: nn.Module) -> dict[int, Held]:
    """Return, by identity, what all holders have that are reached from `model`.

    These are its modules, their classes, the files that these are from, and containers and objects in all of them.
    """
    held: dict[int, Held] = {}
    found: list[tuple[str, Any]] = []

    def hold(identity: int, name: str, items: dict[str, Any], others: Iterable[Any]) -> None:
        unnamed = list(itertools.islice(others, MOST_ITEMS))
        held[identity] = Held(
            name, {key: _note(item) for key, item in items.items()}, list(map(_note, unnamed))
        )
        found.extend(items.items())
        found.extend((name, item) for item in unnamed)

    for identity, name, items in _roots_of(model):
        hold(identity, name, items, ())
    for _ in range(MOST_LEVELS):
        level, found = found, []
        for name, value in level:
            if (
                id(value) in held
                or type(value) in SCALARS
                or issubclass(type(value), (torch.Tensor, *OPAQUE))
            ):
                continue
            if len(found) > MOST_ITEMS:
                return held
            hold(id(value), name, *_items_of(value))
    return held


def _items_of(value: Any) -> tuple[dict[str, Any], Iterable[Any]]:
    """Return the items of an object or container that have names, and the others."""
    items = dict(_fields_of(value))
    others = value if issubclass(type(value), SEQUENCES) else ()
    if issubclass(type(value), dict):
        pairs = list(dict.items(value))
        items |= {key: item for key, item in pairs if type(key) is str}
        others = itertools.chain.from_iterable((key, item) for key, item in pairs if type(key) is not str)
    return items, others


def _fields_of(value: Any) -> Iterator[tuple[str, Any]]:
    with contextlib.suppress(AttributeError):
        yield from dict(object.__getattribute__(value, "__dict__")).items()
    for kind in type(value).__mro__:
        names = kind.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            with contextlib.suppress(AttributeError):
                yield name, object.__getattribute__(value, name)


def _roots_of(model: nn.Module) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield of each holder identity, name, and what it has by name."""
    kinds: dict[type, None] = {}
    for module, path in walk(model).items():
        yield from ((identity, path, items) for identity, items in torch_modules.own_holders(module))
        kinds.update(dict.fromkeys(type(module).__mro__))
    own = [kind for kind in kinds if kind.__module__.partition(".")[0] not in LIBRARIES]
    files = (sys.modules.get(name) for name in dict.fromkeys(kind.__module__ for kind in own))
    for holder in (*own, *files):
        if holder is not None:
            yield id(holder), holder.__name__, dict(vars(holder))


def find_changed(before: dict[int, Held], after: dict[int, Held]) -> frozenset[str]:
    """Return the names of items that differ between the two, and of holders that have others than before.

    >>> find_changed({1: Held("a", {"b": 0}, [])}, {1: Held("a", {"b": 1, "c": 0}, [])}) == {"a", "b", "c"}
    True
    """
    changed: set[str] = set()
    for identity in before.keys() & after.keys():
        old, new = before[identity], after[identity]
        if old.others != new.others or old.items.keys() != new.items.keys():
            changed.add(old.name)
        changed |= old.items.keys() ^ new.items.keys()
        changed |= {
            name for name in old.items.keys() & new.items.keys() if old.items[name] != new.items[name]
        }
    return frozenset(changed)
