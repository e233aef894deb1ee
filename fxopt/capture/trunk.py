"""The trunk at a call: the stock forward, interrupted when the last block has returned."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class TrunkDone(BaseException):
    """Raised when the last block of the trunk has returned; not an Exception, so that nothing swallows it."""


class TailMismatch(Exception):
    """The tail cannot serve this call; `output` is what the stock forward returned, where it ran to its end."""

    def __init__(self, reason: str, output: tuple[Any] | None = None) -> None:
        super().__init__(reason)
        self.output = output


class Trunk(threading.local):
    """Runs one model's stock forward up to its last block; each thread sees only its own run."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._values: list[Any] | None = None
        self._num_calls = 0
        self._wanted: frozenset[int] = frozenset()
        self._judge: Callable[[list[Any]], str | None] = lambda values: None
        self._reason: str | None = None

    @property
    def is_running(self) -> bool:
        """Whether a trunk is being run right now, so that a nested call of the model is a stock one."""
        return self._values is not None

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_calls: int,
        wanted: frozenset[int],
        judge: Callable[[list[Any]], str | None],
    ) -> list[Any]:
        """Return what those `wanted` of `num_calls` block calls returned, None for the others, if `judge` allows it.

        The others are not held: what a block was given may have left for the host since.

        Raises:
            TailMismatch: `judge` gave a reason, or fewer blocks were called; the forward ran on to its end.
        """
        self._values, self._num_calls, self._judge = [], num_calls, judge
        self._wanted = wanted
        self._reason = None
        try:
            output = self.model.forward(*args, **kwargs)
            reason = self._reason or f"{len(self._values)} blocks were called, expected {num_calls}"
            raise TailMismatch(reason, (output,))
        except TrunkDone:
            return self._values
        finally:
            self._values = None

    def after_block(self, value: Any, flat: Any) -> Any:
        """Note a block's value, and what was collected meanwhile, as `flat` while the trunk runs.

        The trunk is interrupted after the last block.
        """
        if self._values is None or self._reason is not None:
            return value
        self._values.append(flat if len(self._values) in self._wanted else None)
        if len(self._values) == self._num_calls:
            self._reason = self._judge(self._values)
            if self._reason is None:
                raise TrunkDone
        return value


def find_other_form(value: Any, example: Any) -> str | None:
    """Return how a block's value differs in form from the `example` its tail was compiled for, or None."""
    if not isinstance(value, torch.Tensor):
        return f"the last block returned a {type(value).__name__}, expected a tensor"
    if (value.dtype, value.ndim, value.requires_grad) != (example.dtype, example.ndim, example.requires_grad):
        return (
            f"the last block returned {value.dtype} of {value.ndim} dimensions "
            f"(requires_grad={value.requires_grad}), expected {example.dtype} of {example.ndim} "
            f"(requires_grad={example.requires_grad})"
        )
    for size, expected in zip(value.shape, example.shape, strict=True):
        if isinstance(expected, int) and size != expected:
            return f"the last block returned shape {tuple(value.shape)}, expected {example.shape}"
    return None
