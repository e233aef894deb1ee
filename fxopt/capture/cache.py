"""The key/value cache of a training call: nothing reads it, and a graph that fills one is another graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fxopt.capture.dispatch import accepts, takes_any
from fxopt.capture.ledger import Ledger


class Cache:
    """Whether a model's calls take a cache, and the calls without one."""

    def __init__(self, model: nn.Module, inner: Iterable[nn.Module], ledger: Ledger) -> None:
        self._model = model
        self._ledger = ledger
        self._is_taken = accepts(model.forward, "use_cache") or (
            takes_any(model.forward) and any(accepts(module.forward, "use_cache") for module in inner)
        )

    def declined(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return `kwargs` with the cache declined, unless the caller asked for one."""
        if not self._is_taken or "use_cache" in kwargs or kwargs.get("past_key_values") is not None:
            return kwargs
        if not self._counts_from_positions() and is_packed(kwargs):
            self._ledger.note(
                "position_ids that begin anew keep sequences apart only without a cache: where the model builds one, "
                "such calls run stock, as one sequence; use_cache=False keeps them apart and is served"
            )
            return kwargs
        self._ledger.note(
            "training calls run with use_cache=False: a key/value cache is not read in training"
        )
        return {**kwargs, "use_cache": False}

    def _counts_from_positions(self) -> bool:
        """Return whether attention itself reads from the positions where sequences begin, cache or not."""
        config = getattr(self._model, "config", None)
        return str(getattr(config, "_attn_implementation", "")).startswith("flash")


def is_packed(kwargs: dict[str, Any]) -> bool:
    """Return whether a call's positions begin anew in a row, with no mask that says more.

    Without a cache transformers attends within such sequences, with one across them (transformers
    masking_utils.py, `_preprocess_mask_arguments`).
    """
    positions = kwargs.get("position_ids")
    if not isinstance(positions, torch.Tensor) or positions.ndim != 2 or positions.is_meta:
        return False
    return kwargs.get("attention_mask") is None and bool((positions.diff(dim=-1) != 1).any())
