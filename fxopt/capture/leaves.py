"""What Dynamo is shown of a model while it captures it: its blocks as leaves, and no hooks around them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fxopt.capture import torch_modules
from fxopt.capture.checkpointing import checkpoints_calls
from fxopt.capture.hooks import Hidden, has_hooks, hide_hooks, show_hooks
from fxopt.capture.modules import walk


class Leaves:
    """The blocks of one model as leaves; `checkpointed` are those that the call which runs now has to checkpoint."""

    def __init__(self, model: nn.Module, blocks: frozenset[nn.Module]) -> None:
        self._model, self._blocks = model, blocks
        self.checkpointed: frozenset[nn.Module] = frozenset()
        self._hidden: Hidden = []

    @contextlib.contextmanager
    def called(self) -> Iterator[None]:
        """Make Dynamo take a block's call through its compile slot, where a leaf sits, not to its forward.

        Dynamo goes straight to `forward` unless a module's `_call_impl` is not the stock method. Where
        checkpointing wraps `__call__` (transformers before it wrapped `forward`), the leaf would end up
        inside it, so its switch is off for the call, and what runs a leaf's block checkpoints it.
        """
        self.checkpointed = frozenset(block for block in self._blocks if checkpoints_calls(block))
        for block in self._blocks:
            block.__dict__[torch_modules.CALL] = functools.partial(torch_modules.stock_call, block)
        for block in self.checkpointed:
            block.__dict__["gradient_checkpointing"] = False
        try:
            yield
        finally:
            for block in self.checkpointed:
                block.__dict__["gradient_checkpointing"] = True
            self.checkpointed = frozenset()
            for block in self._blocks:
                block.__dict__.pop(torch_modules.CALL, None)

    @contextlib.contextmanager
    def hooks_hidden(self, may_hide: Callable[[Any], bool]) -> Iterator[None]:
        """Hide from Dynamo the hooks around the blocks that `may_hide` is true of: the trunk, stock Python, runs them.

        What they do is theirs, and need not be captured: PEFT's makes the embedding's result require a gradient,
        which Dynamo refuses to follow.
        """
        around = [module for module in walk(self._model, but=self._blocks) if module is not self._model]
        self._hidden = hide_hooks(around, may_hide)
        try:
            yield
        finally:
            self.show_hooks()

    def show_hooks(self) -> tuple[nn.Module, ...]:
        """Put the hooks back, and return the modules that carry one which would run at this call."""
        hidden, self._hidden = self._hidden, []
        show_hooks(hidden)
        return tuple(dict.fromkeys(module for module, _, _ in hidden if has_hooks(module)))
