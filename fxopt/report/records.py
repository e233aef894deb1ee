"""Plain records of what fxopt found and did; every other part fills them, `report/` renders them.

A record is made of strings, numbers and other records, and knows neither torch nor any other part of fxopt; only a
report's `str` goes to the renderer beside it.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

Status = Literal["rewritten", "refused", "unmatched"]


@dataclasses.dataclass(frozen=True)
class Proof:
    """The figures of one numeric proof: a rewrite against the stock arithmetic it replaces.

    `error` and `stock_error` are relative norms against a run of the stock arithmetic in `oracle_dtype`
    (float64, or float32 where an input is too large for it; "" where nothing was run), the worst over
    outputs and gradients; `worst` names the value that had it.
    """

    passed: bool
    dtype: str
    device: str
    error: float
    stock_error: float
    worst: str
    compared: tuple[str, ...]
    shapes: tuple[str, ...]
    reason: str = ""
    oracle_dtype: str = "float64"


@dataclasses.dataclass(frozen=True)
class Site:
    """One occurrence of a known form in the stock arithmetic, and what became of it.

    `pattern` is the stock form, `op` what it became ("" when it was not rewritten), `count` the
    layers it stands for, `location` "file:line" of the model's source, `reason` why not. `backend` says what
    serves an op that chooses while it runs, as far as is known when the report is made; "" for others.
    """

    pattern: str
    op: str
    count: int
    status: Status
    module: str
    location: str
    reason: str = ""
    proof: Proof | None = None
    backend: str = ""


@dataclasses.dataclass(frozen=True)
class RewriteRecord:
    """One replacement: the nodes that went and the nodes that came, and the attributes of the op among these."""

    pattern: str
    op: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    attributes: dict[str, Any]
    location: str


@dataclasses.dataclass(frozen=True)
class MismatchRecord:
    """A "no": which pattern came nearest to an anchor and the first constraint that failed."""

    pattern: str
    reason: str
    module: str
    location: str


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """One pass over one graph, as the runner saw it."""

    name: str
    time_ms: float
    nodes_before: int
    nodes_after: int


@dataclasses.dataclass(frozen=True)
class GraphRecord:
    """One capture of a region: its graph before and after, as `graph.snapshot` writes it, and what each pass did."""

    region: str
    capture: int
    before: str
    after: str
    rewrites: tuple[RewriteRecord, ...]
    passes: tuple[PassRecord, ...]


@dataclasses.dataclass(frozen=True)
class RegionRecord:
    """One thing fxopt compiles: `kind` "block" or "model", `module` the first path, `count` its copies.

    `status` is "captured", "stock" (with `reason`), or "pending" before the first step. `breaks` says for each
    place where its graph breaks into pieces why and where.
    """

    kind: str
    module: str
    count: int
    status: str
    captures: int
    reason: str = ""
    breaks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Fallback:
    """A call that ran the stock path although fxopt would have served it, how often and why."""

    region: str
    reason: str
    count: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What fxopt found and did in one model; `print(report)` is the graph diff as text.

    `lowering` is what the compiled graphs run under, "inductor, plain" where these differ, and what was
    asked for where none is compiled yet. `plans` say what the blocks save for backward, each a record whose `str` is
    its table.
    """

    model: str
    sites: tuple[Site, ...] = ()
    rewrites: tuple[RewriteRecord, ...] = ()
    mismatches: tuple[MismatchRecord, ...] = ()
    passes: tuple[PassRecord, ...] = ()
    graphs: tuple[GraphRecord, ...] = ()
    regions: tuple[RegionRecord, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    notes: tuple[str, ...] = ()
    lowering: str = ""
    plans: tuple[Any, ...] = ()

    def to_json(self) -> str:
        """Return the whole report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        """Return the report as text, as `report.text.render_text` formats it."""
        from fxopt.report.text import render_text

        return render_text(self)
