"""Which decision each block takes: the fastest whose simulated peak fits, from the knapsack's sums."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from fxopt.errors import FxoptError
from fxopt.remat.knapsack import Option, find_front
from fxopt.remat.peaks import Column, Table, host_bytes_of_all, peaks_of, times_of
from fxopt.remat.step import Around, peak_bytes
from fxopt.report.plan import Decision

PAIRS = 64
"""So many combinations of menus with two options each are tried; beyond it only neighbours on the hull are paired."""
WORTHWHILE = 0.002
"""What one more form of the last block must save of a step's time: it costs a capture."""

TOO_MUCH = int(np.iinfo(np.int64).max)

Menu = tuple[Decision, ...]
"""Blocks of one form have the same menu: the same object."""
Offer = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The choices worth a look for blocks with these menus, the fastest first; they serve any limit."""

    menus: tuple[Menu, ...]
    table: Table
    host_bytes: Column
    peaks: dict[Around, Column] = dataclasses.field(default_factory=lambda: dict[Around, Column]())
    """By what surrounds the blocks: the peak of each choice, `TOO_MUCH` where that leaves too much on the host."""

    def peaks_within(self, around: Around) -> Column:
        """Return `peaks` of `around`, simulated once."""
        if around not in self.peaks:
            peaks = peaks_of(self.menus, self.table, around)
            self.peaks[around] = np.where(self.host_bytes <= around.host_bytes, peaks, TOO_MUCH)
        return self.peaks[around]

    def numbers_at(self, place: int) -> tuple[int, ...]:
        """Return the number of each block's decision in the choice at `place`."""
        return tuple(map(int, self.table[place]))


def find_candidates(menus: Sequence[Menu]) -> Candidates:
    """Return what `choose_decisions` chooses from."""
    found: set[tuple[int, ...]] = set()
    forms = {id(menu): menu for menu in menus}
    for level in sorted({decision.chunks for menu in menus for decision in menu}):
        at_level = {key: _at_level(form, level) for key, form in forms.items()}
        in_chunks = {key: _most_in_chunks(forms[key], numbers) for key, numbers in at_level.items()}
        for allowed in (at_level, in_chunks) if in_chunks != at_level else (at_level,):
            faster = _find_faster(menus, allowed[id(menus[-1])])
            for numbers in set(_candidates(menus, forms, allowed)):
                found.update((*numbers[:-1], last) for last in faster[numbers[-1]])
    table = np.array(sorted(found))
    host_bytes = host_bytes_of_all(menus, table)
    order: Column = np.lexsort((host_bytes, times_of(menus, table)))  # equals stay in order
    return Candidates(tuple(menus), table[order], host_bytes[order])


def choose_decisions(candidates: Candidates, around: Around, limit: int | None) -> tuple[int, ...] | None:
    """Return the number of each block's decision: the least time whose peak is at most `limit`, or None.

    Blocks with one menu share two decisions at most, since each costs a capture; the last block may have a third:
    it is the first that backward meets, and what it would compute again lives at that instant anyway.
    """
    if limit is None:
        return (0,) * len(candidates.menus)
    fitting = (candidates.peaks_within(around) <= min(limit, TOO_MUCH - 1)).nonzero()[0]
    return candidates.numbers_at(int(fitting[0])) if len(fitting) else None


def find_smallest(candidates: Candidates, around: Around) -> int:
    """Return the lowest peak that any choice reaches."""
    smallest = int(candidates.peaks_within(around).min())
    if smallest == TOO_MUCH:
        raise FxoptError(
            f"max_host_memory: no choice of this plan keeps so little on the host, expected at most "
            f"{around.host_bytes} bytes\nallow more, or plan anew"
        )
    return smallest


def peak_of(menus: Sequence[Menu], numbers: Sequence[int], around: Around) -> int:
    """Return the simulated peak of a step in which each block takes the decision of its number."""
    return peak_bytes([menu[number] for menu, number in zip(menus, numbers, strict=True)], around)


def time_of(menus: Sequence[Menu], numbers: Sequence[int]) -> float:
    """Return the milliseconds that the blocks spend on computing again and on waiting for the host."""
    return sum(menu[number].extra_ms for menu, number in zip(menus, numbers, strict=True))


def host_bytes_of(menus: Sequence[Menu], numbers: Sequence[int]) -> int:
    """Return the bytes that the blocks keep on the host."""
    return sum(menu[number].offloaded_bytes for menu, number in zip(menus, numbers, strict=True))


def _candidates(
    menus: Sequence[Menu], forms: dict[int, Menu], allowed: dict[int, list[int]]
) -> Iterator[tuple[int, ...]]:
    """Yield choices for all blocks: every sum of the knapsack that none beats, for each pair of options per menu.

    Only decisions that are `allowed` to a form are taken: the knapsack, which sums up what is saved, does not see what
    chunks are for.
    """
    counts = Counter(map(id, menus))
    pairing = itertools.combinations
    on_device = {key: [n for n in allowed[key] if not form[n].offloaded_bytes] for key, form in forms.items()}
    offers = {key: _offers(numbers, counts[key], pairing) for key, numbers in on_device.items()}
    if math.prod(map(len, offers.values())) > PAIRS:
        pairing = _neighbours
        offers = {key: _offers(numbers, counts[key], pairing) for key, numbers in on_device.items()}
    for key in forms:  # what may go to the host only adds to what there is without
        if len(on_device[key]) < len(allowed[key]):
            offers[key] = list(dict.fromkeys((*offers[key], *_offers(allowed[key], counts[key], pairing))))
    of_form = {key: [place for place, menu in enumerate(menus) if id(menu) == key] for key in forms}
    places = [place for own in of_form.values() for place in own]
    back = [places.index(place) for place in range(len(menus))]
    for chosen in itertools.product(*offers.values()):
        pairs = zip(forms.items(), chosen, strict=True)
        mixes = [[_ordered(form, mix) for mix in _mixes(offer, counts[key])] for (key, form), offer in pairs]
        options = [
            [_sum_of(form, mix) for mix in found] for form, found in zip(forms.values(), mixes, strict=True)
        ]
        for picked in find_front(options):
            taken = [n for found, number in zip(mixes, picked, strict=True) for n in found[number]]
            yield tuple([taken[place] for place in back])


def _at_level(form: Menu, level: int) -> list[int]:
    """Return the decisions of a menu with, of those that save the same, only the one of most chunks up to `level`."""
    most: dict[tuple[int, int], int] = {}
    for decision in form:
        key = decision.saved_bytes, decision.offloaded_bytes
        if decision.chunks <= level:
            most[key] = max(most.get(key, 1), decision.chunks)
    return [n for n, d in enumerate(form) if d.chunks == most.get((d.saved_bytes, d.offloaded_bytes))]


def _most_in_chunks(form: Menu, numbers: list[int]) -> list[int]:
    """Return those of `numbers` with the most chunks: beside one that runs whole and saves less none seems worth it."""
    most = max((form[number].chunks for number in numbers), default=1)
    return [number for number in numbers if form[number].chunks == most]


def _mixes(offer: Offer, count: int) -> Iterator[Offer]:
    """Yield what `count` equal blocks may take of an offer: in any number one or the other, or one block any."""
    if count == 1:
        yield from ((number,) for number in offer)
        return
    first, second = offer[0], offer[-1]
    for place in range(count + 1 if first != second else 1):
        yield (first,) * place + (second,) * (count - place)


def _sum_of(form: Menu, numbers: Offer) -> Option:
    """Return what blocks of one form keep, cost and leave on the host together."""
    taken = [form[number] for number in numbers]
    return Option(
        sum(decision.saved_bytes for decision in taken),
        sum(round(decision.extra_ms * 1e9) for decision in taken),
        sum(decision.offloaded_bytes for decision in taken),
    )


def _offers(
    numbers: Sequence[int], count: int, pair: Callable[[Sequence[int], int], Iterable[Offer]]
) -> list[Offer]:
    """Return which options to offer to a form's blocks at a time: two of them, or all to one block alone."""
    if not numbers:
        return []
    return [tuple(numbers)] if count == 1 or len(numbers) == 1 else list(pair(numbers, 2))


def _neighbours(numbers: Sequence[int], _: int) -> Iterable[Offer]:
    return itertools.pairwise(numbers)


def _ordered(form: Menu, numbers: Offer) -> Offer:
    """Return `numbers` so that of equal blocks the later save more: what they save is freed first.

    The first ones offload: their values have the longest time to come back.
    """
    return tuple(
        sorted(numbers, key=lambda number: (not form[number].offloaded_bytes, form[number].saved_bytes))
    )


def _find_faster(menus: Sequence[Menu], allowed: list[int]) -> dict[int, list[int]]:
    """Return of each decision of the last block those to try in its place: itself, and faster ones worth a capture.

    The last block offloads nothing: backward needs it at once. Where it would, all its other decisions are tried.
    """
    last = menus[-1]
    least_ms = WORTHWHILE * sum(min(decision.compute_ms for decision in menu) for menu in menus)
    on_device = [number for number in allowed if not last[number].offloaded_bytes]

    def find(number: int) -> list[int]:
        taken = last[number]
        if taken.offloaded_bytes:
            return on_device or [number]
        return [number, *(n for n in on_device if taken.extra_ms - last[n].extra_ms > least_ms)]

    return {number: find(number) for number in range(len(last))}
