"""The key/value cache of a training call: layers with slots of their own read nothing from it, and a graph that fills
one is another graph."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fxopt.capture.dispatch import accepts, takes_any
from fxopt.capture.ledger import Ledger
from fxopt.capture.shared_slots import SharedSlots

DECLINED = (
    "training calls run with use_cache=False: no layer reads from a key/value cache what another call left"
)
ASKED = (
    "calls ask for a key/value cache (use_cache=True), which no graph holds: blocks that are given one run stock; in "
    "training nothing reads it, and without use_cache=True they are served"
)


class Cache:
    """Whether a model's training calls would build a cache of transformers', and the calls without one.

    A model of transformers', alone or under PEFT's adapters, is told by its argument. One within another model, whose
    arguments are its own matter, is told by its config for the time of the call.
    """

    def __init__(self, model: nn.Module, ledger: Ledger) -> None:
        self._model = model
        self._ledger = ledger
        inner = tuple(
            module for module in model.modules() if _is_of(module, "transformers", "PreTrainedModel")
        )
        takers = [module for module in inner if accepts(module.forward, "use_cache")]
        is_adapted = _is_of(model, "peft", "PeftModel") and takes_any(model.forward) and bool(takers)
        self._is_taken = model in takers or is_adapted
        self._inner = inner
        self._slots = SharedSlots(model)
        self._is_looking_only = False

    def find_obstacle(self, kwargs: dict[str, Any], *, is_gathered: bool = False) -> str | None:
        """Return why a call has to keep the cache that the model builds unasked, or None.

        `is_gathered`: ranks gather the model's parameters in one order, as under ZeRO-3.
        """
        if self._is_looking_only or self._is_told(kwargs) or not self._slots.suspects or not self._is_built():
            return None
        return self._slots.find_obstacle(kwargs, is_gathered=is_gathered)

    def look_only(self, kwargs: dict[str, Any]) -> None:
        """Take layers to have slots of their own from now on, as no call trains anything; calls have `kwargs`."""
        self._is_looking_only = True
        if not self._is_told(kwargs) and self._slots.suspects and self._is_built():
            self._ledger.note(self._slots.doubt)

    def watched(self, kwargs: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Return a scope for a stock call that keeps its cache: it shows whether later ones have to."""
        return self._slots.watched(kwargs)

    def declined(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return `kwargs` with the cache declined, unless the caller asked for one or the result hangs on it."""
        if self._model.training and self._is_taken and kwargs.get("use_cache") is True:
            self._ledger.note(ASKED)
        if (
            not self._takes_now()
            or self._is_told(kwargs)
            or self.find_obstacle(kwargs) is not None
            or self._hangs_on_positions(kwargs)
        ):
            return kwargs
        self._ledger.note(DECLINED)
        return {**kwargs, "use_cache": False}

    @contextlib.contextmanager
    def switched_off(self, kwargs: dict[str, Any]) -> Iterator[None]:
        """Have the models within this one build no cache within the scope, as far as their configs decide it."""
        building = [config.__dict__ for config in self._configs() if config.__dict__.get("use_cache")]
        if (
            self._takes_now()
            or not building
            or self._is_told(kwargs)
            or self.find_obstacle(kwargs) is not None
            or self._hangs_on_positions(kwargs)
        ):
            yield
            return
        self._ledger.note(DECLINED)
        before = [(fields, fields["use_cache"]) for fields in building]
        for fields in building:
            fields["use_cache"] = False
        try:
            yield
        finally:
            for fields, value in before:
                fields["use_cache"] = value

    def _takes_now(self) -> bool:
        """Return whether the model takes `use_cache`, and so does what stands in for its forward right now."""
        forward = self._model.__dict__.get("forward")
        return self._is_taken and (forward is None or accepts(forward, "use_cache"))

    def _is_built(self) -> bool:
        """Return whether the configs have a cache built unasked."""
        return any(getattr(config, "use_cache", False) for config in self._configs())

    def _configs(self) -> Iterable[Any]:
        """Return the configs of the models of transformers' within this one, or of itself, each once."""
        configs = (getattr(module, "config", None) for module in self._inner)
        return {id(config): config for config in configs if config}.values()

    def _is_told(self, kwargs: dict[str, Any]) -> bool:
        """Return whether the caller says what to do about a cache: in evaluation, whose results have one, always."""
        if not self._model.training:
            return True
        return self._is_taken and ("use_cache" in kwargs or kwargs.get("past_key_values") is not None)

    def _hangs_on_positions(self, kwargs: dict[str, Any]) -> bool:
        """Return whether a call's positions make its result another without a cache, which is noted."""
        if self._counts_from_positions() or not is_packed(kwargs):
            return False
        self._ledger.note(
            "position_ids that begin anew keep sequences apart only without a cache: where the model builds one, "
            "such calls run stock, as one sequence; use_cache=False keeps them apart and is served"
        )
        return True

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


def _is_of(module: nn.Module, package: str, name: str) -> bool:
    """Return whether `module` is of a class of `package`, which is not imported for that."""
    found: Any = getattr(sys.modules.get(package), name, None)
    return found is not None and isinstance(module, found)
