"""The values of a forward graph, as rematerialization sees them: what each costs to keep and to compute again."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection


@dataclasses.dataclass(frozen=True)
class Value:
    """One value of a forward graph.

    `bytes` is what saving it keeps alive: None where it cannot be saved (a view, whose storage is another
    value's; a tuple). `cost` is what computing it again takes, in picoseconds: None where it cannot be computed
    again (an input, random numbers). `inputs` are the places of the values it is computed from. `stands_for` is the
    place of an equal value that forward computes otherwise: where that is saved, this one is not needed.
    """

    label: str
    inputs: tuple[int, ...]
    bytes: int | None
    cost: int | None
    stands_for: int | None = None


@dataclasses.dataclass(frozen=True)
class Dag:
    """Values in an order in which they can be computed, and the places of those that the backward pass reads."""

    values: tuple[Value, ...]
    needed: frozenset[int]

    def find_recomputed(self, saved: Collection[int]) -> frozenset[int] | None:
        """Return the values that backward computes again where `saved` are kept, or None: it cannot be done so."""
        recomputed: set[int] = set()
        queue = [place for place in self.needed if place not in saved]
        while queue:
            place = queue.pop()
            if place in recomputed:
                continue
            if self.values[place].cost is None:
                return None
            recomputed.add(place)
            queue.extend(source for source in self.values[place].inputs if source not in saved)
        return frozenset(recomputed)

    def settle(self, saved: Collection[int]) -> tuple[frozenset[int], frozenset[int] | None]:
        """Return what is saved and what computed again, where equal values of `saved` are read in place of others."""
        read: dict[int, int] = {}
        for place, value in enumerate(self.values):
            if value.stands_for is not None and not {place, value.stands_for}.isdisjoint(saved):
                read[place] = value.stands_for
        kept = frozenset(read.get(place, place) for place in saved)
        values = tuple(
            dataclasses.replace(value, inputs=tuple(read.get(source, source) for source in value.inputs))
            for value in self.values
        )
        needed = frozenset(read.get(place, place) for place in self.needed)
        return kept, Dag(values, needed).find_recomputed(kept)

    def bytes_of(self, places: Collection[int]) -> int:
        """Return the bytes that saving `places` keeps alive."""
        return sum(self.values[place].bytes or 0 for place in places)

    def cost_of(self, places: Collection[int]) -> int:
        """Return the picoseconds that computing `places` again takes."""
        return sum(self.values[place].cost or 0 for place in places)
