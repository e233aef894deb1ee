"""Plans while a model's first step runs: each joint graph is seen as it is captured, and tagged for its decision.

The first block to be captured stands for those not seen yet. Where a later one turns out to be of another form, the
blocks that have not run are decided again; what has been compiled stays.
"""

from __future__ import annotations

import dataclasses
import fractions
import logging
from collections.abc import Callable
from typing import Any

from torch import fx

from fxopt.remat.apply import apply_choice
from fxopt.remat.budget import Budget
from fxopt.remat.choice import (
    Candidates,
    choose_decisions,
    find_candidates,
    find_smallest,
    host_bytes_of,
)
from fxopt.remat.decide import Menu, find_choice, make_decision, make_menu, read_tagged
from fxopt.remat.figures import (
    Facts,
    Goal,
    find_limit,
    find_lower_goal,
    make_plan,
    without_update,
)
from fxopt.remat.given import FROZEN, decided_number, follows, frozen_menu, menu_of
from fxopt.remat.joint import Joint, read_joint
from fxopt.remat.offers import Offers
from fxopt.remat.offload import hides_host
from fxopt.remat.step import Around
from fxopt.remat.surroundings import Surroundings
from fxopt.remat.tokens import Call, Tokens
from fxopt.remat.variants import Chosen, Variants
from fxopt.remat.views import Views
from fxopt.report.plan import Decision, Plan
from fxopt.report.plan_table import summarize_plan

log = logging.getLogger("fxopt")


WHOLE = (
    "the plan that was given is for {planned} tokens a call: in shorter calls, and where lengths change, blocks run "
    "whole that run in chunks there or keep some rows of a value"
)


class StepPlanner:
    """Decides, once per kind of call, what each block of one model saves; capture asks it and shows it graphs."""

    def __init__(self, budget: Budget, find_facts: Callable[[], Facts], given: Plan | None = None) -> None:
        self._budget = budget
        self._find_facts = find_facts
        self._given = given
        self._forms: dict[Any, Any] = {}
        self._menus: dict[Any, Menu] = {}
        self._form_of: dict[str, Any] = {}
        self._seen: set[str] = set()
        self._tokens = Tokens()
        self._last: Goal | None = None
        self._surroundings = Surroundings()
        self._variants = Variants()
        self._goals: dict[Goal, Chosen] = {}
        self._offers = Offers()
        self._candidates: Candidates | None = None
        self._facts: Facts | None = None
        self._said: set[str] = set()
        self._differing: dict[str, None] = {}
        self._host_bytes: int | None = 0
        self._is_short = False
        """Whether calls for which nobody asked a plan have one, since without it one did not fit."""

    @property
    def lowering(self) -> str:
        """What the graphs are compiled for."""
        return self._look().lowering

    @property
    def host_bytes(self) -> int:
        """The most that any plan carried out so far keeps on the host."""
        if self._host_bytes is None:  # it is asked for at each call of a block
            taken = [
                (self._offered(goal, chosen.forms), chosen.numbers) for goal, chosen in self._goals.items()
            ]
            self._host_bytes = max((host_bytes_of(*choice) for choice in taken), default=0)
        return self._host_bytes

    @property
    def host_limit(self) -> int:
        """The most that may be reserved on the host."""
        return self._look().host_bytes

    @property
    def limits(self) -> dict[str, int]:
        """What this rank's device has, by name: ranks that train one model plan for the least of each.

        Of what lives all the time that is the most, since it is taken from the rest.
        """
        facts = self._look()
        free = {} if facts.free_bytes is None else {"free": facts.free_bytes}
        taken = {"untaken": -facts.static_bytes}
        return {"memory": facts.device.memory_bytes, "host": facts.host_bytes, **taken, **free}

    def agree(self, limits: dict[str, int]) -> None:
        """Plan for `limits`, the least of all ranks."""
        facts = self._look()
        self._facts = dataclasses.replace(
            facts,
            device=dataclasses.replace(facts.device, memory_bytes=limits["memory"]),
            host_bytes=limits["host"],
            static_bytes=-limits["untaken"],
            free_bytes=limits.get("free"),
        )

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans carried out so far, in the order in which they were needed."""
        return tuple(
            self._describe(goal, chosen.numbers, chosen.forms) for goal, chosen in self._goals.items()
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the plans carried out so far do not count, and why, and where a given one was not followed."""
        uncounted = self._facts.uncounted if self._goals and self._facts else ""
        return (*([uncounted] if uncounted else []), *self._differing)

    def is_asked(self, *, checkpointed: bool) -> bool:
        """Return whether calls are planned: under "auto" those that ask for the least memory, or have not fitted."""
        return checkpointed or self._budget != "auto" or self._given is not None or self._is_short

    @property
    def num_tokens(self) -> int:
        """The tokens of the call that runs."""
        return self._tokens.of_call

    def is_too_much(self, kept_bytes: int, working: int) -> bool:
        """Return whether a step does not fit whose blocks keep so much each, and once `working` times that."""
        facts = self._find_facts()
        if facts.free_bytes is None:
            return False
        beside = facts.static_bytes + facts.gradient_bytes
        return beside + (len(facts.paths) + working) * kept_bytes > facts.free_bytes

    def find_variant(self, path: str, call: Call) -> int | None:
        """Return the number of the variant that serves the block at `path`; None where nothing is planned."""
        tokens = self._follow(path, call)
        goal = self._last = self._find_goal(call, tokens) if tokens and call.tokens else None
        if goal is None:
            return None
        if goal not in self._goals and all(path in self._form_of for path in self._look().paths):
            self._plan(goal, None, 0)
        variants = self._goals.get(goal)
        return self._variants.count if variants is None else variants.of_path[path]

    def mark_block(self, path: str, variant: int, call: Call, graph: fx.Graph, held: frozenset[int]) -> str:
        """Tag the joint graph of the block at `path` for its decision, and return what tells that apart."""
        goal = self._find_goal(call, self._tokens.of_call)
        assert goal is not None, "a planned block was called without a plan"
        before = self._form_of.get(path)
        if before is FROZEN:  # it trains now, and others may: what they save is not known
            self._seen.difference_update([p for p, form in self._form_of.items() if form is FROZEN])
        views, form = self._read_block(path, call, graph, held)
        if (
            goal not in self._goals
            or before is not form
            or self._variants.find_decision(variant, form) is None
        ):
            for other in self._look().paths:
                if other not in self._seen:
                    self._form_of[other] = form
            self._plan(goal, path, variant)
        number = self._variants.find_decision(variant, form)
        assert number is not None, "a planned block has no decision"
        decision = self._menus[form].decisions[number]
        joint = views.carry_out(decision)
        choice = find_choice(joint, decision)
        assert not isinstance(choice, str), f"{choice} is in no graph of its own form"
        apply_choice(graph, joint, choice)
        kept, gone = ([residual.op for residual in part] for part in (decision.saved, decision.offloaded))
        # What is gone changes what backward may write to.
        return f"{decision.chunks} {decision.sixteenths} {kept} {gone}"

    def describe_last(self) -> str:
        """Return the figures of the plan of the last call, in one line."""
        chosen = self._last and self._goals.get(self._last)
        if self._last is None or chosen is None:
            return "no plan"
        return summarize_plan(self._describe(self._last, chosen.numbers, chosen.forms))

    def lower(self) -> str | None:
        """Make the plan for calls like the last one need less, and return its figures; None where none does."""
        if not self.is_asked(checkpointed=False) and self._last is None:
            self._is_short, self._facts = True, None
            return "the fastest plan that fits what is free"
        chosen = self._last and self._goals.get(self._last)
        if self._last is None or chosen is None or self._given is not None:
            return None
        lowered = find_lower_goal(self._last, self._describe(self._last, chosen.numbers, chosen.forms))
        if lowered is None:
            return None
        del self._goals[self._last]
        self._host_bytes = None
        self._last = lowered
        self._plan(lowered, None, 0)
        return self.describe_last()

    def _follow(self, path: str, call: Call) -> int:
        """Return the tokens of the model's call in which the block at `path` is called."""
        tokens = self._tokens.follow(path, call.tokens)
        self._surroundings.note_tokens(tokens)
        return tokens

    def _read_block(self, path: str, call: Call, graph: fx.Graph, held: frozenset[int]) -> tuple[Views, Any]:
        """Return the joint graph as the planner reads it, and its form; its menu is made where that is new."""
        facts = self._look()
        views = Views(graph, lambda graph: self._read(graph, held), facts.declared)
        key = views.key, fractions.Fraction(call.tokens, self._tokens.of_call)
        form = self._forms.setdefault(key, key)
        if form not in self._menus:
            given, tokens = self._given, self._tokens.of_call
            offloads = facts.host_bytes > 0 and (facts.host_is_asked or hides_host(views.whole))
            if given is None:
                menu = views.add_parts(views.add_chunks(make_menu(views.whole, tokens, offloads=offloads)))
            else:
                menu = menu_of(given, views, tokens, facts)
                if not follows(menu, given):
                    self._differing.setdefault(WHOLE.format(planned=given.tokens))
            self._menus[form] = menu
        self._form_of[path] = form
        self._seen.add(path)
        return views, form

    def _read(self, graph: fx.Graph, held: frozenset[int], *, last: bool = False) -> Joint:
        facts = self._look()
        device, declared, fuses = facts.device, facts.declared, facts.lowering == "inductor"
        measured = facts.measured.find_costs(graph, held, device, declared)
        return read_joint(graph, held, device, fuses=fuses, last=last, declared=declared, measured=measured)

    def form_of(self, path: str) -> Any:
        """Return what tells the captured form of the block at `path` from others, None before it was seen."""
        return self._form_of.get(path)

    def note_form(self, path: str, form: Any) -> None:
        """Note that a call of the block at `path` was served by a graph of `form`: another block's, captured before.

        None is the form of a call that asks for no gradient, as those of frozen blocks before all that trains.
        """
        self._seen.add(path)
        if form is None:
            form = FROZEN
            self._menus.setdefault(form, frozen_menu(self._given))
        self._form_of[path] = form
        chosen = self._last and self._goals.get(self._last)
        place = self._look().paths.index(path)
        if chosen is None or chosen.forms[place] is form:
            return
        number = 0 if form is FROZEN else self._variants.find_decision(chosen.of_path[path], form)
        if number is not None:
            chosen.numbers = (*chosen.numbers[:place], number, *chosen.numbers[place + 1 :])
            chosen.forms = (*chosen.forms[:place], form, *chosen.forms[place + 1 :])
            self._host_bytes = None

    def begin_tail(self) -> None:
        """Forget what follows the blocks: it is being captured anew, piece by piece."""
        self._surroundings.forget()

    def read_tail(self, graph: fx.Graph, held: frozenset[int]) -> str:
        """Note what a piece after the blocks needs in memory; it is not planned."""
        joint = self._read(graph, held, last=True)
        self._surroundings.add(make_decision(joint, read_tagged(joint)))
        return ""

    def _find_goal(self, call: Call, tokens: int) -> Goal | None:
        if not self.is_asked(checkpointed=call.checkpointed):
            return None
        is_least = self._budget == "auto" and self._given is None and call.checkpointed
        budget = "min" if is_least else self._budget
        known = [g for g in self._goals if g.budget == budget and g.tokens / 2 < tokens <= g.tokens]
        return min(known, key=lambda goal: goal.tokens) if known else Goal(tokens, budget)

    def _look(self) -> Facts:
        if self._facts is None:
            self._facts = self._find_facts()
        return self._facts

    def _plan(self, goal: Goal, current: str | None, variant: int) -> None:
        """Decide for `goal` what each block does; the one at `current` is being compiled as `variant`."""
        facts = self._look()
        numbers = self._decide(goal, facts, current)
        chosen = dict(zip(facts.paths, numbers, strict=True))
        if current is not None:
            self._variants.set_decision(variant, self._form_of[current], chosen[current])
        of_path = {
            path: self._variants.find_variant(self._form_of[path], chosen[path]) for path in facts.paths
        }
        self._goals[goal] = Chosen(numbers, of_path, self._forms_now())
        self._host_bytes = None

    def _decide(self, goal: Goal, facts: Facts, current: str | None) -> tuple[int, ...]:
        before = self._goals.get(goal)
        menus: list[tuple[Decision, ...]] = []
        fixed: list[int | None] = []
        forms = self._forms_now()
        for place, (path, offered) in enumerate(zip(facts.paths, self._offered(goal, forms), strict=True)):
            settled = None
            if self._given is not None:
                menu, is_known = self._menus[self._form_of[path]], path in self._seen
                settled = decided_number(self._given, menu, place, goal.tokens, is_known=is_known)
            elif before is not None and path in self._seen and path != current:
                settled = before.numbers[place] if before.forms[place] is forms[place] else None
            menus.append(offered if settled is None else (offered[settled],))
            fixed.append(settled)
        around = self._around(goal, facts, forms)
        candidates = self._candidates_of(menus)
        limit = self._limit(goal, facts, candidates, around)
        picked = choose_decisions(candidates, without_update(goal, around), limit)
        assert picked is not None, "the smallest plan does not fit in its own peak"
        return tuple(n if settled is None else settled for n, settled in zip(picked, fixed, strict=True))

    def _forms_now(self) -> tuple[Any, ...]:
        return tuple(self._form_of[path] for path in self._look().paths)

    def _offered(self, goal: Goal, forms: tuple[Any, ...]) -> list[tuple[Decision, ...]]:
        """Return the menu of each block, of its form among `forms`, for the tokens of `goal`."""
        return self._offers.find(goal, self._look(), [self._menus[form] for form in forms])

    def _candidates_of(self, menus: list[tuple[Decision, ...]]) -> Candidates:
        """Return the choices from `menus`; the last ones found serve all limits asked for."""
        last = self._candidates
        if last is None or [id(menu) for menu in last.menus] != [id(menu) for menu in menus]:
            last = self._candidates = find_candidates(menus)
        return last

    def _around(self, goal: Goal, facts: Facts, forms: tuple[Any, ...]) -> Around:
        return self._surroundings.around(goal, facts, [self._menus[form] for form in set(forms)])

    def _limit(self, goal: Goal, facts: Facts, candidates: Candidates, around: Around) -> int | None:
        """Return the most that a step may allocate; what is to be said of it is said once."""
        if self._given is not None:
            return None
        limit, warning = find_limit(goal, facts, candidates, around)
        if warning and warning not in self._said:
            self._said.add(warning)
            log.warning("%s", warning)
        return limit

    def _describe(
        self, goal: Goal, numbers: tuple[int, ...], forms: tuple[Any, ...], facts: Facts | None = None
    ) -> Plan:
        facts, menus = facts or self._look(), self._offered(goal, forms)
        around = self._around(goal, facts, forms)
        candidates = self._candidates_of(menus)
        limit = self._limit(goal, facts, candidates, around)
        smallest = find_smallest(candidates, around)
        plan = make_plan(facts, goal, limit, smallest, menus, numbers, around)
        if self._given is None:
            return plan
        return dataclasses.replace(plan, budget=self._given.budget, limit_bytes=self._given.limit_bytes)
