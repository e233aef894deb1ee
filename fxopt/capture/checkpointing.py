"""Gradient checkpointing as transformers switches it on, taken over where a planner decides what is computed again.

Its wrapper sits around `__call__` (transformers before 5.2x) or `forward`: outside of what is compiled, or as one node
inside it. Either reads the block's switch at each call, so that is off while a planned model runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from fxopt.capture import torch_tensors
from fxopt.capture.forwards import run_gathered

SWITCH = "gradient_checkpointing"


class Checkpointing:
    """The switches of one model's blocks; `taken` are the blocks whose own checkpointing is off for this call."""

    def __init__(self, blocks: Iterable[nn.Module], *, planned: bool) -> None:
        self._blocks = tuple(blocks)
        self._planned = planned
        self.taken: frozenset[nn.Module] = frozenset()

    @contextlib.contextmanager
    def taken_over(self) -> Iterator[None]:
        """Keep the blocks from checkpointing themselves within the scope, if a planner does it."""
        blocks = [block for block in self._blocks if is_checkpointed(block)] if self._planned else []
        if not blocks:
            yield
            return
        previous, self.taken = self.taken, frozenset(blocks)
        for block in blocks:
            block.__dict__[SWITCH] = False
        try:
            yield
        finally:
            self.taken = previous
            for block in blocks:
                block.__dict__[SWITCH] = True

    def run_unplanned(
        self, block: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a block that no plan serves by `run`, checkpointed where it would have been."""
        if block not in self.taken:
            return run(*args, **kwargs)
        return self.run_outside(block, run, *args, **kwargs)

    def run_outside(self, block: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block by `run`, checkpointed around what that captures."""

        def run_once(*inputs: Any) -> Any:
            with _switched_off(block):  # in backward too, when the model's call is long over
                again = torch_tensors.is_in_backward()
                return run_gathered(block, run, *inputs, **kwargs) if again else run(*inputs, **kwargs)

        checkpoint: Any = block._gradient_checkpointing_func
        return checkpoint(run_once, *args)


@contextlib.contextmanager
def _switched_off(block: nn.Module) -> Iterator[None]:
    previous = getattr(block, SWITCH)
    block.__dict__[SWITCH] = False
    try:
        yield
    finally:
        block.__dict__[SWITCH] = previous


def is_checkpointed(block: nn.Module) -> bool:
    """Return whether this block is told to recompute itself in the backward pass now."""
    return (
        block.training
        and getattr(block, SWITCH, False) is True
        and callable(getattr(block, "_gradient_checkpointing_func", None))
    )


def checkpoints_calls(block: nn.Module) -> bool:
    """Return whether this block's `__call__`, not its `forward`, recomputes it in the backward pass now."""
    return type(block).__call__ is not nn.Module.__call__ and is_checkpointed(block)
