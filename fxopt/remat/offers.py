"""What each block of a model may decide in a step of so many tokens: its menu, scaled to these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fxopt.remat.decide import Menu
from fxopt.remat.figures import Facts, Goal, scale_decision
from fxopt.remat.step import Beside, copy_shared, spread_decision
from fxopt.report.plan import Decision


class Offers:
    """Scales the menus of one model's blocks, which outlive it; equal blocks of one menu have the same decisions."""

    def __init__(self) -> None:
        self._scaled: dict[tuple[int, int, Beside, int], tuple[Decision, ...]] = {}

    def find(self, goal: Goal, facts: Facts, menus: Sequence[Menu]) -> list[tuple[Decision, ...]]:
        """Return the decisions of each block, whose menus are given in the order of the blocks."""
        sizes = Counter(path.rpartition(".")[0] for path in facts.paths)  # of the stacks
        return [
            self._find(goal, facts, menu, facts.spread.of(place), sizes[path.rpartition(".")[0]])
            for place, (path, menu) in enumerate(zip(facts.paths, menus, strict=True))
        ]

    def _find(self, goal: Goal, facts: Facts, menu: Menu, beside: Beside, equal: int) -> tuple[Decision, ...]:
        key = id(menu), goal.tokens, beside, equal
        if key not in self._scaled:
            scaled = [scale_decision(decision, goal.tokens / menu.tokens) for decision in menu.decisions]
            if facts.replayed:
                scaled = [copy_shared(decision, equal) for decision in scaled]
            self._scaled[key] = tuple(spread_decision(decision, beside) for decision in scaled)
        return self._scaled[key]
