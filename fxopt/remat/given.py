"""A plan that was made before, given back to be carried out: what of it each block can do."""

from __future__ import annotations

from fxopt.errors import FxoptError
from fxopt.remat.decide import Menu, find_choice
from fxopt.remat.figures import Facts
from fxopt.remat.menu import Choice
from fxopt.remat.views import Views
from fxopt.report.plan import Decision, Plan

CURE = "make one with fxopt.plan(model, memory_budget, example_inputs)"


def menu_of(given: Plan, views: Views, tokens: int, facts: Facts) -> Menu:
    """Return the decisions of `given` that a block can carry out, in their order there.

    Raises:
        FxoptError: the plan was made for another model.
    """
    paths = tuple(path for path, _ in given.layers)
    if paths != facts.paths:
        raise FxoptError(
            f"plan: made for another model, expected {len(facts.paths)} blocks of {facts.model}, "
            f"got {len(paths)} of {given.model}\n{CURE}"
        )
    found = [(decision, _find_choice(views, decision)) for decision in given.decisions]
    fitting = [(decision, choice) for decision, choice in found if not isinstance(choice, str)]
    if not fitting:
        missing = next(choice for _, choice in found if isinstance(choice, str))
        raise FxoptError(
            f"plan: made for another model or lowering, expected values of this block's own, got {missing}, "
            f"which it does not compute\n{CURE}"
        )
    decisions = tuple(views.decide(choice, decision) for decision, choice in fitting)
    numbers = {given.decisions.index(decision): place for place, (decision, _) in enumerate(fitting)}
    return Menu(tuple(choice for _, choice in fitting), decisions, tokens, numbers)


def _find_choice(views: Views, decision: Decision) -> Choice | str:
    """Return the choice that carries `decision` out, or what of it the block does not have."""
    joint = views.joint_of(decision)
    return f"{decision.chunks} chunks" if joint is None else find_choice(joint, decision)


def decided_number(given: Plan, menu: Menu, place: int, tokens: int, *, is_known: bool) -> int:
    """Return the number in `menu` of what `given` decided for the block at `place`.

    A block not known yet is taken to be like another one: where that has no such decision, any stands for it until
    its own menu is there.

    Raises:
        FxoptError: the plan was made for another model, or for fewer tokens.
    """
    if tokens > given.tokens:
        raise FxoptError(
            f"plan: made for another shape, expected at most {given.tokens} tokens a call, "
            f"got {tokens}\n{CURE}"
        )
    path, number = given.layers[place]
    if number not in menu.numbers and is_known:
        raise FxoptError(
            f"plan: made for another model, expected for {path} a decision that it can carry out, "
            f"got number {number}\n{CURE}"
        )
    return menu.numbers.get(number, 0)
