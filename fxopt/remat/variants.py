"""Which variant of a block serves each decision: blocks of one form share a capture per decision."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Chosen:
    """The plan of one goal while it is carried out: each block's decision, and the variant that serves it.

    `numbers` count in the menus of `forms`: what captures made for other calls have come to be is another's matter.
    """

    numbers: tuple[int, ...]
    of_path: dict[str, int]
    forms: tuple[Any, ...]


class Variants:
    """The decisions that the variants of each form carry out, by their numbers in that form's menu."""

    def __init__(self) -> None:
        self.count = 0
        self._decisions: dict[tuple[int, Any], int] = {}

    def find_decision(self, variant: int, form: Any) -> int | None:
        """Return the number of the decision that `variant` carries out for blocks of `form`, or None."""
        return self._decisions.get((variant, form))

    def set_decision(self, variant: int, form: Any, number: int) -> None:
        """Make `variant` carry the decision of that number out for blocks of `form`."""
        self._decisions[variant, form] = number
        self.count = max(self.count, variant + 1)

    def find_variant(self, form: Any, number: int) -> int:
        """Return the variant that carries a decision out for blocks of `form`; a free one where none does yet."""
        for (variant, served), carried in self._decisions.items():
            if served == form and carried == number:
                return variant
        taken = {variant for variant, served in self._decisions if served == form}
        free = next((v for v in range(self.count) if v not in taken), self.count)
        self.set_decision(free, form, number)
        return free
