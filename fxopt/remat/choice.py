"""Which decision each block takes: the fastest whose simulated peak fits, from the knapsack's sums."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from fxopt.remat.knapsack import Option, find_front
from fxopt.remat.step import Around, peak_bytes
from fxopt.report.plan import Decision

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
    found = sorted(
        found, key=lambda numbers: (time_of(menus, numbers), host_bytes_of(menus, numbers), numbers)
    )
    return Candidates(tuple(menus), tuple(found))


def choose_decisions(candidates: Candidates, around: Around, limit: int | None) -> tuple[int, ...] | None:
    """Return the number of each block's decision: the least time whose peak is at most `limit`, or None.

    Blocks with one menu share two decisions at most, since each costs a capture; the last block may have a third:
    it is the first that backward meets, and what it would compute again lives at that instant anyway.
    """
    if limit is None:
        return (0,) * len(candidates.menus)
    fitting = (
        numbers
        for numbers in candidates.numbers
        if host_bytes_of(candidates.menus, numbers) <= around.host_bytes
        and peak_of(candidates.menus, numbers, around) <= limit
    )
    return next(fitting, None)


def find_smallest(candidates: Candidates, around: Around) -> int:
    """Return the lowest peak that any choice reaches."""
    return min(
        peak_of(candidates.menus, numbers, around)
        for numbers in candidates.numbers
        if host_bytes_of(candidates.menus, numbers) <= around.host_bytes
    )


def peak_of(menus: Sequence[Menu], numbers: Sequence[int], around: Around) -> int:
    """Return the simulated peak of a step in which each block takes the decision of its number."""
    return peak_bytes([menu[number] for menu, number in zip(menus, numbers, strict=True)], around)


def time_of(menus: Sequence[Menu], numbers: Sequence[int]) -> float:
    """Return the milliseconds that the blocks spend on computing again and on waiting for the host."""
    return sum(menu[number].extra_ms for menu, number in zip(menus, numbers, strict=True))


def host_bytes_of(menus: Sequence[Menu], numbers: Sequence[int]) -> int:
    """Return the bytes that the blocks keep on the host."""
    return sum(menu[number].offloaded_bytes for menu, number in zip(menus, numbers, strict=True))


def _candidates(menus: Sequence[Menu]) -> Iterator[tuple[int, ...]]:
    """Yield choices for all blocks: every sum of the knapsack that none beats, for each pair of options per menu."""
    forms = {id(menu): menu for menu in menus}
    counts = Counter(map(id, menus))
    pairing = itertools.combinations
    on_device = {key: [n for n, d in enumerate(form) if not d.offloaded_bytes] for key, form in forms.items()}
    offers = {key: _offers(numbers, counts[key], pairing) for key, numbers in on_device.items()}
    if math.prod(map(len, offers.values())) > PAIRS:
        pairing = _neighbours
        offers = {key: _offers(numbers, counts[key], pairing) for key, numbers in on_device.items()}
    for key, form in forms.items():  # what may go to the host only adds to what there is without
        if len(on_device[key]) < len(form):
            offers[key] = list(
                dict.fromkeys((*offers[key], *_offers(range(len(form)), counts[key], pairing)))
            )
    for chosen in itertools.product(*offers.values()):
        offered = dict(zip(forms, chosen, strict=True))
        options = {
            key: [
                Option(form[n].saved_bytes, round(form[n].extra_ms * 1e9), form[n].offloaded_bytes)
                for n in offered[key]
            ]
            for key, form in forms.items()
        }
        for picked in find_front([options[id(menu)] for menu in menus]):
            numbers = [offered[id(menu)][number] for menu, number in zip(menus, picked, strict=True)]
            yield _ordered(menus, numbers)


def _offers(
    numbers: Sequence[int], count: int, pair: Callable[[Sequence[int], int], Iterable[Offer]]
) -> list[Offer]:
    """Return which options to offer to a form's blocks at a time: two of them, or all to one block alone."""
    if not numbers:
        return []
    return [tuple(numbers)] if count == 1 or len(numbers) == 1 else list(pair(numbers, 2))


def _neighbours(numbers: Sequence[int], _: int) -> Iterable[Offer]:
    return itertools.pairwise(numbers)


def _ordered(menus: Sequence[Menu], numbers: Sequence[int]) -> tuple[int, ...]:
    """Return `numbers` so that of equal blocks the later save more: what they save is freed first.

    The first ones offload: their values have the longest time to come back.
    """
    result = list(numbers)
    for key, form in {id(menu): menu for menu in menus}.items():
        places = [place for place, menu in enumerate(menus) if id(menu) == key]
        ordered = sorted(
            (numbers[place] for place in places),
            key=lambda number: (not form[number].offloaded_bytes, form[number].saved_bytes),
        )
        for place, number in zip(places, ordered, strict=True):
            result[place] = number
    return tuple(result)


def _spare_the_last(menus: Sequence[Menu], numbers: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield `numbers`, and the same with each faster decision for the last block that is worth a capture.

    The last block offloads nothing: backward needs it at once. Where it would, all its other decisions are yielded.
    """
    last, taken = menus[-1], menus[-1][numbers[-1]]
    if taken.offloaded_bytes:
        kept = [number for number, decision in enumerate(last) if not decision.offloaded_bytes]
        yield from ((*numbers[:-1], number) for number in kept or (numbers[-1],))
        return
    yield numbers
    total = sum(menu[number].compute_ms for menu, number in zip(menus, numbers, strict=True))
    for faster, decision in enumerate(last[: numbers[-1]]):
        if not decision.offloaded_bytes and taken.extra_ms - decision.extra_ms > WORTHWHILE * total:
            yield (*numbers[:-1], faster)
