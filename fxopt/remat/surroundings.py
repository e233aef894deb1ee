"""What a step needs beside its blocks: what follows these, and what lives all the time."""

from __future__ import annotations

from collections.abc import Iterable

from fxopt.remat.decide import Menu
from fxopt.remat.figures import Facts, Goal, scale_decision, scale_residuals
from fxopt.remat.step import Around, shared_bytes_of, spread_decision
from fxopt.report.plan import Decision

USABLE = 7 / 8
"""How much of the host's memory plans count on: pieces do not fill the chunks they are cut from."""


class Surroundings:
    """What follows the blocks of one model, as it was captured piece by piece in a call of so many tokens."""

    def __init__(self) -> None:
        self._tail: list[Decision] = []
        self._tokens: int | None = None

    def forget(self) -> None:
        """Forget what follows the blocks: it is being captured anew."""
        self._tail, self._tokens = [], None

    def add(self, decision: Decision) -> None:
        """Note what one piece saves and works on."""
        self._tail.append(decision)

    def note_tokens(self, tokens: int) -> None:
        """Note the tokens of a call; the first one since the pieces were forgotten is the one that captures them."""
        if not self._tokens:
            self._tokens = tokens

    def around(self, goal: Goal, facts: Facts, menus: Iterable[Menu]) -> Around:
        """Return what surrounds blocks with these `menus` in a step of `goal`."""
        scale = goal.tokens / (self._tokens or goal.tokens)
        beside = facts.spread.tail
        tail = tuple(spread_decision(scale_decision(decision, scale), beside) for decision in self._tail)
        kinds = (scale_residuals(menu.shared, goal.tokens / menu.tokens) for menu in menus)
        return Around(
            facts.static_bytes,
            tail,
            gradient_bytes=facts.gradient_bytes,
            host_bytes=int(facts.host_bytes * USABLE),
            whole_bytes=facts.spread.whole_bytes + shared_bytes_of(kinds),
            reduced_bytes=facts.spread.reduced_bytes,
            tied_bytes=facts.tied_bytes,
        )
