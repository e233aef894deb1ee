"""The key/value cache of a training call: nothing reads it, and a graph that fills one is another graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fxopt.capture.dispatch import accepts, takes_any
from fxopt.capture.ledger import Ledger


class Cache:
    """Whether a model's calls take a cache, and the calls without one."""

    def __init__(self, model: nn.Module, inner: Iterable[nn.Module], ledger: Ledger) -> None:
        self._ledger = ledger
        self._is_taken = accepts(model.forward, "use_cache") or (
            takes_any(model.forward) and any(accepts(module.forward, "use_cache") for module in inner)
        )

    def declined(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return `kwargs` with the cache declined, unless the caller asked for one."""
        if not self._is_taken or "use_cache" in kwargs or kwargs.get("past_key_values") is not None:
            return kwargs
        self._ledger.note(
            "training calls run with use_cache=False: a key/value cache is not read in training"
        )
        return {**kwargs, "use_cache": False}
