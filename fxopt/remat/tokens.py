"""How many tokens a call of the model has: those of the block that runs first in it.

A model may hold stacks of blocks with token counts of their own (patches of an image, a longer text): what each saves
is seen at one call, and scaled by what that call's first block was given.
"""

from __future__ import annotations

from typing import Protocol


class Call(Protocol):
    """A block's call that asks for a plan."""

    @property
    def tokens(self) -> int:
        """The tokens that this block is given."""
        ...

    @property
    def checkpointed(self) -> bool:
        """Whether the user switched checkpointing on."""
        ...


class Tokens:
    """Follows the calls of one model's blocks, and says how many tokens the model's own call has."""

    def __init__(self) -> None:
        self.of_call = 1
        self._called: set[str] = set()

    def follow(self, path: str, tokens: int) -> int:
        """Note that the block at `path` is called with so many tokens; return those of the model's call.

        A block that was called before begins another call of the model.
        """
        if not self._called or path in self._called:
            self._called = set()
            self.of_call = tokens
        self._called.add(path)
        return self.of_call
