"""What is noted of values and of models, and what of it tells a change."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.capture import held_state
from fxopt.capture.held_state import find_changed, is_container, note_held, note_value


class Slotted:
    __slots__ = ("inner", "number")

    def __init__(self) -> None:
        self.number = 1


class Plain:
    def __init__(self) -> None:
        self.number = 1
        self.itself = self


class Model(nn.Module):
    shared: dict[str, int] = {}  # noqa: RUF012 (what is tested)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("steps", torch.zeros(()))
        self.numbers, self.nested = [1, 2], {"a": {"b": [1]}}
        self.counted: Counter[str] = Counter("aab")
        self.keyed: dict[Any, int] = {3: 4}
        self.kinds = defaultdict(list, {"x": [1]})
        self.ordered, self.recent, self.items = OrderedDict(z=1), deque([1]), {1, 2}
        self.slotted, self.plain = Slotted(), Plain()
        self.tensor = torch.zeros(2)


GLOBAL: list[int] = []

CHANGES: dict[str, Callable[[Model], object]] = {
    "numbers": lambda model: model.numbers.append(3),
    "b": lambda model: model.nested["a"]["b"].append(2),
    "a": lambda model: model.counted.update("a"),
    "keyed": lambda model: model.keyed.update({3: 5}),
    "x": lambda model: model.kinds["x"].clear(),
    "z": lambda model: model.ordered.update(z=2),
    "recent": lambda model: model.recent.appendleft(0),
    "items": lambda model: model.items.add(3),
    "number": lambda model: setattr(model.slotted, "number", 2),
    "tensor": lambda model: model.tensor.add_(1),
    "steps": lambda model: model.steps.add_(1),
    "weight": lambda model: model.linear.weight.detach().add_(1),
    "linear": lambda model: setattr(model, "linear", nn.Linear(2, 2)),
    "training": lambda model: model.eval(),
    "new": lambda model: setattr(model, "new", 1),
    "shared": lambda model: Model.shared.update(one=1),
    "GLOBAL": lambda model: GLOBAL.append(1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_told_by_the_name_of_what_changed(name: str) -> None:
    model = Model()
    before = note_held(model)
    assert find_changed(before, note_held(model)) == frozenset()
    CHANGES[name](model)
    assert name in find_changed(before, note_held(model))


def test_an_object_that_holds_itself_and_one_without_its_slot_are_noted() -> None:
    model = Model()
    before = note_held(model)
    model.plain.number = 2
    assert find_changed(before, note_held(model)) == {"number"}


def test_what_is_noted_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_state, "MOST_ITEMS", 10)
    model = Model()
    model.numbers = list(range(1000))
    before = note_held(model)
    assert max(len(held.others) for held in before.values()) == 10
    model.numbers[999] = 0
    assert find_changed(before, note_held(model)) == frozenset()


def test_values_are_noted_with_what_is_in_containers() -> None:
    value = {"a": [torch.zeros(2), (1, {2})]}
    before = note_value(value)
    assert note_value(value) == before
    value["a"][0].add_(1)
    assert note_value(value) != before
    assert note_value((1, 2)) == note_value((1, 2)), "equal tuples cannot be told apart"
    assert [is_container(item) for item in ([], (), {}, set(), deque(), Plain(), "ab")] == [True] * 5 + [
        False
    ] * 2
    array = pytest.importorskip("numpy").zeros(3)
    before = note_value(array)
    array[0] = 1
    assert note_value(array) != before
