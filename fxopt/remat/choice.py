"""Which decision each block takes: the fastest whose simulated peak fits, from the knapsack's sums."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from fxopt.remat.knapsack import Option, find_front
from fxopt.remat.records import Decision
from fxopt.remat.step import Around, find_peak, simulate_step

PAIRS = 64
"""So many combinations of menus with two options each are tried; beyond it only neighbours on the hull are paired."""
WORTHWHILE = 0.002
"""What one more form of the last block must save of a step's time: it costs a capture."""

Menu = tuple[Decision, ...]


def choose_decisions(
    paths: Sequence[str], menus: Sequence[Menu], around: Around, limit: int | None
) -> tuple[int, ...] | None:
    """Return the number of each block's decision: the least time whose peak is at most `limit`, or None.

    Blocks with one menu share two decisions at most, since each costs a capture; the last block may have a third:
    it is the first that backward meets, and what it would compute again lives at that instant anyway.
    """
    if limit is None:
        return (0,) * len(menus)
    best: tuple[float, tuple[int, ...]] | None = None
    for numbers in _candidates(menus):
        cost = time_of(menus, numbers)
        if best is not None and cost >= best[0]:
            continue
        if peak_of(paths, menus, numbers, around) <= limit:
            best = cost, numbers
    return best and _spare_the_last(paths, menus, best[1], around, limit)


def find_smallest(paths: Sequence[str], menus: Sequence[Menu], around: Around) -> int:
    """Return the lowest peak that any choice reaches."""
    return min(peak_of(paths, menus, numbers, around) for numbers in _candidates(menus))


def peak_of(paths: Sequence[str], menus: Sequence[Menu], numbers: Sequence[int], around: Around) -> int:
    """Return the simulated peak of a step in which each block takes the decision of its number."""
    decisions = [menu[number] for menu, number in zip(menus, numbers, strict=True)]
    return find_peak(simulate_step(paths, decisions, around)).bytes


def time_of(menus: Sequence[Menu], numbers: Sequence[int]) -> float:
    """Return the milliseconds that the blocks spend on computing again."""
    return sum(menu[number].recompute_ms for menu, number in zip(menus, numbers, strict=True))


def _candidates(menus: Sequence[Menu]) -> Iterator[tuple[int, ...]]:
    """Yield choices for all blocks: every sum of the knapsack that none beats, for each pair of options per menu."""
    forms = list(dict.fromkeys(menus))
    pairs = [list(itertools.combinations(range(len(form)), 2)) or [(0, 0)] for form in forms]
    if _product(len(pair) for pair in pairs) > PAIRS:
        pairs = [list(itertools.pairwise(range(len(form)))) or [(0, 0)] for form in forms]
    for chosen in itertools.product(*pairs):
        offered = dict(zip(forms, chosen, strict=True))
        options = [
            tuple(
                Option(menu[number].saved_bytes, round(menu[number].recompute_ms * 1e9))
                for number in offered[menu]
            )
            for menu in menus
        ]
        for picked in find_front(options):
            numbers = [offered[menu][number] for menu, number in zip(menus, picked, strict=True)]
            yield _ordered(menus, numbers)


def _product(sizes: Iterator[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _ordered(menus: Sequence[Menu], numbers: Sequence[int]) -> tuple[int, ...]:
    """Return `numbers` so that of equal blocks the later save more: what they save is freed first."""
    result = list(numbers)
    for form in set(menus):
        places = [place for place, menu in enumerate(menus) if menu is form or menu == form]
        ordered = sorted((numbers[place] for place in places), key=lambda number: form[number].saved_bytes)
        for place, number in zip(places, ordered, strict=True):
            result[place] = number
    return tuple(result)


def _spare_the_last(
    paths: Sequence[str], menus: Sequence[Menu], numbers: tuple[int, ...], around: Around, limit: int
) -> tuple[int, ...]:
    """Return `numbers` with a faster decision for the last block, where the peak allows it and it is worth it."""
    total = sum(menu[number].compute_ms for menu, number in zip(menus, numbers, strict=True))
    for faster in range(numbers[-1]):
        gain = menus[-1][numbers[-1]].recompute_ms - menus[-1][faster].recompute_ms
        spared = (*numbers[:-1], faster)
        if gain > WORTHWHILE * total and peak_of(paths, menus, spared, around) <= limit:
            return spared
    return numbers
