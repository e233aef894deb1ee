"""When a forward pass runs out of memory, or its step would: it runs once more, under a plan that needs less.

A step that nobody planned shows by its first blocks what the others will keep. Where that does not fit what is free, it
is not run to its end: it begins again under the fastest plan that fits.

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

from fxopt.capture import torch_distributed, torch_modules, torch_tensors
from fxopt.capture.checkpointing import Checkpointing
from fxopt.capture.engines import gathers
from fxopt.capture.ledger import Ledger
from fxopt.capture.planning import Planner

Holders = list[dict[str, torch.Tensor | None]]
"""Where modules keep their buffers: the same dictionaries as long as the modules are the same."""

log = logging.getLogger("fxopt")

PROBED = 3
"""After so many blocks of a call it is seen what one keeps: the first ones keep what all share as well."""
WORKING = 3
"""What the backward pass of one block needs beside what blocks keep, in times of what one keeps.

Simulated steps of Qwen2.5-7B, QLoRA: 2.13 GiB where a block keeps 0.83.
"""


class Shortage:
    """What one model does where memory runs out."""

    def __init__(
        self, model: nn.Module, planner: Planner, ledger: Ledger, checkpointing: Checkpointing
    ) -> None:
        self._find_model = weakref.ref(model)
        self._planner = planner
        self._ledger = ledger
        self._checkpointing = checkpointing
        self._is_tail_read = True
        self._holders: Holders | None = None
        self._before: tuple[int, ...] = ()
        self._levels: list[int] | None = None
        self._most_tokens = 0

    @property
    def is_planned(self) -> bool:
        """Whether calls have a plan now."""
        return self._planner.is_asked(checkpointed=bool(self._checkpointing.taken))

    @property
    def needs_tail(self) -> bool:
        """Whether calls are planned now, and what follows the blocks was compiled when they were not."""
        return not self._is_tail_read and self.is_planned

    def begin_tail(self) -> bool:
        """Note that what follows the blocks is about to be compiled; return whether a plan has to see it."""
        self._is_tail_read = self.is_planned
        return self._is_tail_read

    def run(self, serve: Callable[[], Any]) -> Any:
        """Return what `serve` returns, a forward pass of the model.

        Raises:
            torch.OutOfMemoryError: it needs more than there is under any plan, or cannot be run twice.
        """
        if self._holders is None:
            self._holders = torch_modules.find_buffers(self._model())
        self._before = _writes(self._holders)
        self._levels = None if self.is_planned else []
        try:
            return serve()
        except torch.OutOfMemoryError as error:
            plan = self._planner.describe_last()
            reason = self._find_obstacle()
            if not self.is_planned and torch_distributed.num_ranks() > 1:
                reason = "ranks that train one model plan for the least that one of them has, before their first step"
            self._holders, self._levels = None, None
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

    def after_block(self) -> None:
        """See what the blocks of an unplanned call keep, where it has more tokens than any before.

        Raises:
            torch.OutOfMemoryError: the step would not fit, and may be run twice.
        """
        levels = self._levels  # read once: a thread that evaluates may come here too
        if levels is None:
            return
        if not levels:
            tokens = self._planner.num_tokens
            if tokens <= self._most_tokens or torch_distributed.num_ranks() > 1:
                self._levels = None
                return
        device = next(self._model().parameters()).device
        levels.append(torch_tensors.allocated_bytes(device))
        if len(levels) < PROBED:
            return
        self._levels = None
        kept = levels[-1] - levels[-2]
        if kept <= 0:
            return
        self._most_tokens = self._planner.num_tokens
        if self._planner.is_too_much(kept, WORKING) and not self._find_obstacle():
            raise torch.OutOfMemoryError(f"blocks keep {kept / 2**20:.1f} MiB each, which will not fit")

    def _find_obstacle(self) -> str:
        model = self._model()
        if gathers(model):
            return "its parameters are gathered from all ranks, which do not run it again"
        if self._ledger.changes_state:
            return "a block changes Python objects, which a second forward pass would do twice"
        if self._holders is None or not _are_same(torch_modules.find_buffers(model), self._holders):
            return "buffers were put into the model since its first call, and may have been written to"
        if _writes(self._holders) != self._before:
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
