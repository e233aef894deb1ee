"""What happened while an optimized model ran: captures, which layer each serves, fallbacks, notes."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from fxopt.capture.progress import Progress
from fxopt.report.records import Fallback


@dataclasses.dataclass
class Capture:
    """One captured graph of one region; `outcome` is what the passes made of it.

    `broken` says why the graph ends before its region does, and where; "" where it does not.
    """

    region: str
    number: int
    outcome: Any
    broken: str = ""


@dataclasses.dataclass
class Ledger:
    """Everything the report needs that only running tells. One per optimized model."""

    captures: list[Capture] = dataclasses.field(default_factory=list)
    served: dict[str, list[Capture]] = dataclasses.field(default_factory=dict)
    fallbacks: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    lowerings: dict[str, None] = dataclasses.field(default_factory=dict)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: dict[str, None] = dataclasses.field(default_factory=dict)
    changes_state: bool = False
    """Whether a block keeps values in Python objects, where the model may read them."""
    hooked: str = ""
    """The kind of module inside a block on which a hook was met during the model's call that runs now."""
    progress: Progress = dataclasses.field(default_factory=Progress)
    _current: str = ""
    _pieces: list[Capture] = dataclasses.field(default_factory=list)

    @property
    def current(self) -> str:
        """The path of the block or model whose call began last."""
        return self._current

    @property
    def has_run(self) -> bool:
        """Whether a training call was served, or refused, since fxopt was installed."""
        return bool(self.captures or self.fallbacks)

    def begin(self, path: str) -> None:
        """Record that a call of the block or model at `path` begins: what serves it is the next captures that run."""
        self._current, self._pieces = path, []

    @property
    def is_served(self) -> bool:
        """Whether any capture ran for the call that began last."""
        return bool(self._pieces)

    def serve(self, capture: Capture) -> None:
        """Record that `capture` ran for the call that began last; one call may take several, where a graph breaks."""
        self._pieces.append(capture)
        self.served[self._current] = self._pieces

    def add_capture(self, region: str, outcome: Any, broken: str = "") -> Capture:
        """Record a new capture of `region`."""
        capture = Capture(region, sum(c.region == region for c in self.captures), outcome, broken)
        self.captures.append(capture)
        return capture

    def count_fallback(self, region: str, reason: str) -> None:
        """Count a call that ran the stock path although fxopt should have served it."""
        self.fallbacks[region, reason] += 1

    def note(self, text: str) -> None:
        """Record something the user should know, once."""
        self.notes.setdefault(text)

    @property
    def num_recompiles(self) -> int:
        """How many captures were made beyond the first of each region."""
        return len(self.captures) - len({capture.region for capture in self.captures})

    def fallback_records(self) -> tuple[Fallback, ...]:
        """Return the fallbacks counted so far as records, most frequent first."""
        return tuple(
            Fallback(region, reason, count) for (region, reason), count in self.fallbacks.most_common()
        )
