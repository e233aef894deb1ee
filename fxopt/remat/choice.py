"""Which decision each block takes: the fastest whose simulated peak fits, from the knapsack's sums."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from fxopt.remat.knapsack import Option, find_front
from fxopt.remat.records import Decision
from fxopt.remat.step import Around, peak_bytes

PAIRS = 64
"""So many combinations of menus with two options each are tried; beyond it only neighbours on the hull are paired."""
WORTHWHILE = 0.002
"""What one more form of the last block must save of a step's time: it costs a capture."""

Menu = tuple[Decision, ...]
"""Blocks of one form have the same menu: the same object."""
Offer = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The choices worth a look for blocks with these menus, the fastest first; they serve any limit."""

    menus: tuple[Menu, ...]
    numbers: tuple[tuple[int, ...], ...]


def find_candidates(menus: Sequence[Menu]) -> Candidates:
    """Return what `choose_decisions` chooses from."""
    found = {spared for numbers in set(_candidates(menus)) for spared in _spare_the_last(menus, numbers)}
    found = sorted(found, key=lambda numbers: (time_of(menus, numbers), numbers))
    return Candidates(tuple(menus), tuple(found))


def choose_decisions(candidates: Candidates, around: Around, limit: int | None) -> tuple[int, ...] | None:
    """Return the number of each block's decision: the least time whose peak is at most `limit`, or None.

    Blocks with one menu share two decisions at most, since each costs a capture; the last block may have a third:
    it is the first that backward meets, and what it would compute again lives at that instant anyway.
    """
    if limit is None:
        return (0,) * len(candidates.menus)
    fitting = (
        numbers for numbers in candidates.numbers if peak_of(candidates.menus, numbers, around) <= limit
    )
    return next(fitting, None)


def find_smallest(candidates: Candidates, around: Around) -> int:
    """Return the lowest peak that any choice reaches."""
    return min(peak_of(candidates.menus, numbers, around) for numbers in candidates.numbers)


def peak_of(menus: Sequence[Menu], numbers: Sequence[int], around: Around) -> int:
    """Return the simulated peak of a step in which each block takes the decision of its number."""
    return peak_bytes([menu[number] for menu, number in zip(menus, numbers, strict=True)], around)


def time_of(menus: Sequence[Menu], numbers: Sequence[int]) -> float:
    """Return the milliseconds that the blocks spend on computing again."""
    return sum(menu[number].recompute_ms for menu, number in zip(menus, numbers, strict=True))


def _candidates(menus: Sequence[Menu]) -> Iterator[tuple[int, ...]]:
    """Yield choices for all blocks: every sum of the knapsack that none beats, for each pair of options per menu."""
    forms = {id(menu): menu for menu in menus}
    counts = Counter(map(id, menus))
    offers = {
        key: _offers(range(len(form)), counts[key], itertools.combinations) for key, form in forms.items()
    }
    if math.prod(map(len, offers.values())) > PAIRS:
        offers = {key: _offers(range(len(form)), counts[key], _neighbours) for key, form in forms.items()}
    for chosen in itertools.product(*offers.values()):
        offered = dict(zip(forms, chosen, strict=True))
        options = {
            key: [Option(form[n].saved_bytes, round(form[n].recompute_ms * 1e9)) for n in offered[key]]
            for key, form in forms.items()
        }
        for picked in find_front([options[id(menu)] for menu in menus]):
            numbers = [offered[id(menu)][number] for menu, number in zip(menus, picked, strict=True)]
            yield _ordered(menus, numbers)


def _offers(numbers: range, count: int, pair: Callable[[range, int], Iterable[Offer]]) -> list[Offer]:
    """Return which options to offer to a form's blocks at a time: two of them, or all to one block alone."""
    return [tuple(numbers)] if count == 1 or len(numbers) == 1 else list(pair(numbers, 2))


def _neighbours(numbers: range, _: int) -> Iterable[Offer]:
    return itertools.pairwise(numbers)


def _ordered(menus: Sequence[Menu], numbers: Sequence[int]) -> tuple[int, ...]:
    """Return `numbers` so that of equal blocks the later save more: what they save is freed first."""
    result = list(numbers)
    for key, form in {id(menu): menu for menu in menus}.items():
        places = [place for place, menu in enumerate(menus) if id(menu) == key]
        ordered = sorted((numbers[place] for place in places), key=lambda number: form[number].saved_bytes)
        for place, number in zip(places, ordered, strict=True):
            result[place] = number
    return tuple(result)


def _spare_the_last(menus: Sequence[Menu], numbers: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield `numbers`, and the same with each faster decision for the last block that is worth a capture."""
    yield numbers
    total = sum(menu[number].compute_ms for menu, number in zip(menus, numbers, strict=True))
    for faster in range(numbers[-1]):
        if menus[-1][numbers[-1]].recompute_ms - menus[-1][faster].recompute_ms > WORTHWHILE * total:
            yield (*numbers[:-1], faster)
