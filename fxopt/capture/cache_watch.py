"""A look at what layers do to the key/value cache that one call hands from each to the next."""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxopt.capture import torch_modules
from fxopt.capture.torch_tensors import version_of


class Watch:
    """What the layers of one call, in one thread, do to a cache that they are given."""

    def __init__(self) -> None:
        self.shared: str | None = None
        self.unread: str | None = None
        self._calls: collections.Counter[nn.Module] = collections.Counter()
        self._thread = threading.get_ident()
        self._held: list[dict[Any, tuple[torch.Tensor, int]]] = []

    def has_run(self, first: nn.Module, second: nn.Module) -> bool:
        """Return whether both layers ran: one that stands at both places, twice."""
        return self._calls[second] > (first is second) and self._calls[first] > 0

    @contextlib.contextmanager
    def hooked(self, path: str, layer: nn.Module) -> Iterator[None]:
        """Watch the calls of `layer` within the scope."""
        before = layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        after = layer.register_forward_hook(functools.partial(self._leave, path), with_kwargs=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == self._thread:
            self._calls[layer] += 1
            self.unread = self.unread or _find_unread(layer, args, kwargs)
            self._held.append(_find_cached(args, kwargs))

    def _leave(
        self, path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if threading.get_ident() == self._thread:
            held, now = self._held.pop(), _find_cached(args, kwargs)
            for place, (tensor, version) in held.items():
                found = now.get(place)
                if found is None or found[0] is not tensor or found[1] != version:
                    self.shared = path


def parameters_of(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of the forward of `layer`, none where they cannot be read."""
    try:
        return tuple(inspect.signature(torch_modules.forward_of(type(layer))).parameters)[1:]
    except (TypeError, ValueError):
        return ()


def _find_unread(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return the type of a cache among the arguments that is none of transformers' (remote code's own, tuples)."""
    given = {**dict(zip(parameters_of(layer), args, strict=False)), **kwargs}
    unread = (
        value
        for name, value in given.items()
        if "past" in name and value is not None and not isinstance(value, _cache_class())
    )
    return next((type(value).__name__ for value in unread), None)


def _cache_class() -> Any:
    """Return transformers' class of caches; where transformers was not imported, no value is of it."""
    return getattr(sys.modules.get("transformers"), "Cache", ())


def _find_cached(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Any, tuple[torch.Tensor, int]]:
    """Return by place the tensors, each with its version, that caches of transformers' hold among the arguments."""
    kind = _cache_class()
    found: dict[Any, tuple[torch.Tensor, int]] = {}
    seen: set[int] = set()
    queue: list[tuple[tuple[Any, ...], Any]] = [
        ((id(value),), value) for value in (*args, *kwargs.values()) if isinstance(value, kind)
    ]
    while queue:
        place, value = queue.pop()
        if isinstance(value, torch.Tensor):
            if value.numel():
                found[place] = (value, version_of(value))
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, list | tuple):
            queue += [((*place, index), item) for index, item in enumerate(value)]
        else:
            fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
            queue += [((*place, name), item) for name, item in fields.items()]
    return found
