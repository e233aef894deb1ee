"""When a planned forward pass runs out of memory: it runs once more, under a plan that needs less.

A forward pass leaves nothing behind but what it wrote to: where a buffer was written to, or a block changed Python
objects, a second one would do it twice, and the error stands. So does an error in backward, whose gradients may be
added to already.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxopt.capture import torch_distributed, torch_modules, torch_tensors, zero
from fxopt.capture.ledger import Ledger
from fxopt.capture.planning import Planner

Holders = list[dict[str, torch.Tensor | None]]
"""Where modules keep their buffers: the same dictionaries as long as the modules are the same."""

log = logging.getLogger("fxopt")


class Shortage:
    """What one planned model does where memory runs out."""

    def __init__(self, model: nn.Module, planner: Planner, ledger: Ledger) -> None:
        self._find_model = weakref.ref(model)
        self._planner = planner
        self._ledger = ledger
        self._holders: Holders | None = None

    def run(self, serve: Callable[[], Any]) -> Any:
        """Return what `serve` returns, a forward pass of the model.

        Raises:
            torch.OutOfMemoryError: it needs more than there is under any plan, or cannot be run twice.
        """
        if self._holders is None:
            self._holders = torch_modules.find_buffers(self._model())
        before = _writes(self._holders)
        try:
            return serve()
        except torch.OutOfMemoryError as error:
            plan = self._planner.describe_last()
            reason = self._find_obstacle(before)
            self._holders = None
            smaller = None if reason else self._planner.lower()
            if smaller is None:
                _explain(error, plan, reason or "no plan needs less")
                raise
            text = str(error).partition("\n")[0]
        # Out of the handler: what the failed pass held is freed with the error's traceback.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        note = f"out of memory ({text}) under {plan}: run again under {smaller}"
        log.warning("%s", note)
        self._ledger.note(note)
        try:
            return serve()
        except torch.OutOfMemoryError as error:
            _explain(error, smaller, "this was the second attempt")
            raise

    def _find_obstacle(self, before: tuple[int, ...]) -> str:
        model = self._model()
        is_sharded = any(torch_distributed.fsdp_state_of(module) is not None for module in model.modules())
        if is_sharded or any(map(zero.is_partitioned, model.parameters())):
            return "its parameters are gathered from all ranks, which do not run it again"
        if self._ledger.changes_state:
            return "a block changes Python objects, which a second forward pass would do twice"
        if self._holders is None or not _are_same(torch_modules.find_buffers(model), self._holders):
            return "buffers were put into the model since its first call, and may have been written to"
        if _writes(self._holders) != before:
            return "the forward pass writes to a buffer of the model, which a second one would do twice"
        return ""

    def _model(self) -> nn.Module:
        model = self._find_model()
        assert model is not None, "the model is gone, expected it to make this call"
        return model


def _are_same(some: Holders, others: Holders) -> bool:
    return list(map(id, some)) == list(map(id, others))


def _writes(holders: Holders) -> tuple[int, ...]:
    buffers = (buffer for holder in holders for buffer in holder.values() if buffer is not None)
    return tuple(map(torch_tensors.version_of, buffers))


def _explain(error: BaseException, plan: str, reason: str) -> None:
    error.add_note(f"fxopt: not run again, since {reason}; the plan was: {plan}")
