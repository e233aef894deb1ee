"""What happened while an optimized model ran: captures, which layer each serves, fallbacks, notes."""

from __future__ import annotations

import collections
import dataclasses
import logging
from typing import Any

from fxopt.capture.progress import Progress
from fxopt.report.records import MODEL_REGION, Fallback

log = logging.getLogger("fxopt")
MANY = 16
"""So many captures of one region are told of: shapes and plans take a few."""


@dataclasses.dataclass
class Capture:
    """One captured graph of one region; `outcome` is what the passes made of it.

    `broken` says why the graph ends before its region does, and where; "" where it does not. `order` has the numbers of
    the region's parameters in the order in which the graph hands on their gradients.
    """

    region: str
    number: int
    outcome: Any
    broken: str = ""
    order: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Way:
    """How a region ran in one call: by captures with these `orders`, or stock (None) for a `reason`."""

    orders: tuple[tuple[int, ...], ...] | None
    reason: str = ""

    @property
    def is_late(self) -> bool:
        """Whether it ran without gradients, so that another run, in backward, is the one that hands them on."""
        return self == WITHOUT_GRADIENTS

    def __str__(self) -> str:
        return f"stock ({self.reason})" if self.orders is None else "captured"


NOT_CAPTURED = Way(None, "it was not captured")
WITHOUT_GRADIENTS = Way(None, "without gradients")


@dataclasses.dataclass
class Ledger:
    """Everything the report needs that only running tells. One per optimized model."""

    captures: list[Capture] = dataclasses.field(default_factory=list)
    served: dict[str, list[Capture]] = dataclasses.field(default_factory=dict)
    fallbacks: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    lowerings: dict[str, None] = dataclasses.field(default_factory=dict)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    broken: dict[str, str] = dataclasses.field(default_factory=dict)
    """Why the blocks of a region that run in pieces were not captured whole."""
    notes: dict[str, None] = dataclasses.field(default_factory=dict)
    changes_state: bool = False
    """Whether a block keeps values in Python objects, where the model may read them."""
    hooked: str = ""
    """Why a hook inside a block, met during the model's call that runs now, keeps it from being served."""
    progress: Progress = dataclasses.field(default_factory=Progress)
    ways: dict[str, Way] | None = None
    """How each block, and the model for what follows them, ran in the training call that runs now, if one does."""
    way: Way = NOT_CAPTURED
    """How the block or model that ran last did."""
    _current: str = ""
    _pieces: list[Capture] = dataclasses.field(default_factory=list)
    _stock_pieces: set[str] = dataclasses.field(default_factory=set[str])
    """Why pieces of the call that began last ran as stock."""

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
        self._current, self._pieces, self._stock_pieces = path, [], set()
        self.way = NOT_CAPTURED

    @property
    def is_served(self) -> bool:
        """Whether any capture ran for the call that began last."""
        return bool(self._pieces)

    def serve(self, capture: Capture) -> None:
        """Record that `capture` ran for the call that began last; one call may take several, where a graph breaks."""
        self._pieces.append(capture)
        self.served[self._current] = self._pieces
        self.note_way(self._current, Way(tuple(piece.order for piece in self._pieces)))

    def note_way(self, path: str, way: Way) -> None:
        """Record how the block or model at `path` ran."""
        self.way = way
        if self.ways is not None:
            self.ways[path] = way

    def add_capture(
        self, region: str, outcome: Any, broken: str = "", order: tuple[int, ...] = ()
    ) -> Capture:
        """Record a new capture of `region`."""
        number = sum(c.region == region for c in self.captures)
        capture = Capture(region, number, outcome, broken, order)
        self.captures.append(capture)
        if number + 1 == MANY:
            pieces = [c.broken for c in self.captures if c.region == region and c.broken]
            cause = "calls or layers differ in their arguments, or in what its forward reads in Python; "
            if pieces:
                cause = f"{len(pieces)} of these are pieces that its forward breaks into ({pieces[0]}); "
            text = (
                f"{region or 'the model'}: captured {MANY} times, which takes a second or more each: {cause}"
                f"TORCH_LOGS={'graph_breaks,' * bool(pieces)}recompiles tells what"
            )
            log.warning("%s", text)
            self.note(text)
        return capture

    def count_fallback(self, region: str, reason: str) -> None:
        """Count a call that ran the stock path although fxopt should have served it."""
        self.fallbacks[region, reason] += 1
        if region == MODEL_REGION:
            self.note_way(MODEL_REGION, Way(None, reason))

    def count_stock_piece(self, region: str, reason: str) -> None:
        """Count that the call that began last ran a piece as stock; pieces of one call for one reason are one."""
        if reason not in self._stock_pieces:
            self._stock_pieces.add(reason)
            self.count_fallback(region, reason)

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
