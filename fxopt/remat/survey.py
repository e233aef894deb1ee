"""A plan before any training: all graphs of a model are seen first, then all blocks are decided together."""

from __future__ import annotations

import dataclasses

from torch import fx

from fxopt.errors import FxoptError
from fxopt.remat.budget import Budget
from fxopt.remat.figures import Goal
from fxopt.remat.planner import StepPlanner
from fxopt.remat.tokens import Call
from fxopt.report.plan import Plan


class Survey(StepPlanner):
    """Sees the graphs of a model that is not trained, and plans once all are seen."""

    def is_asked(self, *, checkpointed: bool) -> bool:
        """Return True: a survey is there to plan."""
        return True

    def find_variant(self, path: str, call: Call) -> int | None:
        """Return 0: nothing is carried out."""
        self._follow(path, call)
        return 0

    def mark_block(self, path: str, variant: int, call: Call, graph: fx.Graph, held: frozenset[int]) -> str:
        """Read the joint graph of the block at `path`."""
        if call.tokens:
            self._read_block(path, call, graph, held)
        return ""

    def make_plan(self) -> Plan | None:
        """Return the plan for what was seen, or None where a block was not captured.

        Raises:
            FxoptError: the blocks were given no tokens.
        """
        if not self._tokens.of_call:
            raise FxoptError(
                "example_inputs: expected at least one token, got none\ngive inputs as they are in training"
            )
        if any(path not in self._form_of for path in self._look().paths):
            return None
        return self._plan_for(self._budget)

    def trace_curve(self, num_points: int) -> tuple[Plan, ...]:
        """Return plans from the smallest peak to the fastest step, at equal distances of bytes."""
        smallest, fastest = self._plan_for("min"), self._plan_for(None)
        low, high = smallest.peak_bytes, fastest.peak_bytes
        limits = [low + (high - low) * step // (num_points - 1) for step in range(1, num_points - 1)]
        return smallest, *(self._plan_for(limit, bounded=False) for limit in limits), fastest

    def _plan_for(self, budget: Budget, *, bounded: bool = True) -> Plan:
        facts = self._look()
        if not bounded:  # a curve goes on beyond what the device has
            facts = dataclasses.replace(facts, device=dataclasses.replace(facts.device, bounded=False))
        goal = Goal(self._tokens.of_call, budget)
        return self._describe(goal, self._decide(goal, facts, None), self._forms_now(), facts)
