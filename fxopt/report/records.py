"""Plain records of what fxopt found and did; every other part fills them, `report/` renders them.

A record is made of strings, numbers and other records, and knows neither torch nor any other part of fxopt; only a
report's `str` goes to the renderer beside it, and its `measure`, while it is there, to what fills in the rest.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fxopt.report.plan import Plan

SCHEMA = 1
"""The version of the JSON form; raised where a field goes or changes its meaning, not where one comes."""
CAME_LATER = {"came_later": True}
"""Marks a field that a file of this schema may lack, for it was written before the field came."""

Status = Literal["rewritten", "refused", "unmatched"]
NOT_FINITE = frozenset({"nan", "inf", "-inf"})
"""Floats that JSON has no number for, as they are written."""
MODEL_REGION = "(model)"
"""The region of what follows the blocks, of the whole model where it has none: no path of a module reads so."""


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
class RewriteElsewhere:
    """A rewrite at no site: of a form that the search for sites does not know, as a user's own pattern has.

    `pattern` found it, `op` is what it became; the other fields are those of a site.
    """

    pattern: str
    op: str
    count: int
    module: str
    location: str
    proof: Proof | None = None


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
    """A "no": which pattern came nearest to an anchor and the first constraint that failed.

    `matched` nodes fitted before it did; `wanted` is the pattern as a small graph, `found` the model's own around
    the place, the nodes that did not fit marked with ">". `anchor` is the kind of site it was at, "" at none, and
    `count` the layers it stands for. `proof` has the figures of a match that was refused for them.
    """

    pattern: str
    reason: str
    module: str
    location: str
    matched: int = 0
    anchor: str = ""
    wanted: str = ""
    found: str = ""
    count: int = 1
    proof: Proof | None = dataclasses.field(default=None, metadata=CAME_LATER)


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """One pass over one graph, as the runner saw it."""

    name: str
    time_ms: float
    nodes_before: int
    nodes_after: int


@dataclasses.dataclass(frozen=True)
class NodeRecord:
    """One node of a graph.

    `kind` is "input", "output", "op" (it computes into memory of its own), "view" (it does not), or "lazy" (it runs
    only where somebody reads what it leads to); `bytes` are those an op writes or an input holds. `pattern`
    names the rewrite that brought it in, "" for a node of the model's; `origins` are the stock nodes it stands for.
    """

    name: str
    label: str
    op: str
    kind: str
    inputs: tuple[str, ...]
    type: str
    bytes: int
    module: str
    location: str
    pattern: str
    origins: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Work:
    """What a graph launches and keeps in one training pass, each op run by itself.

    `forward_kernels` and `backward_kernels` are the ops that write memory, an op of fxopt being one; `saved_bytes` are
    what autograd keeps from forward to backward beside the graph's own inputs.
    """

    forward_kernels: int
    backward_kernels: int
    saved_bytes: int


@dataclasses.dataclass(frozen=True)
class GraphRecord:
    """One capture of a region: its graph before and after, as `graph.snapshot` writes it, and what each pass did.

    `layers` is how many blocks it serves, `code` the rewritten graph as Python that runs. `work_before` and
    `work_after` say what it launches and saves, None where that is not known.
    """

    region: str
    capture: int
    before: str
    after: str
    rewrites: tuple[RewriteRecord, ...]
    passes: tuple[PassRecord, ...]
    layers: int = 1
    nodes_before: tuple[NodeRecord, ...] = ()
    nodes_after: tuple[NodeRecord, ...] = ()
    code: str = ""
    work_before: Work | None = None
    work_after: Work | None = None


@dataclasses.dataclass(frozen=True)
class RegionRecord:
    """One thing fxopt compiles: `kind` "block" or "model", `module` the first path, `count` its copies.

    `status` is "captured", "stock" (with `reason`: where it may be captured, why no call was served so far), or
    "pending" before the first step. `breaks` says for each
    place where its graph breaks into pieces why and where, `guards` under which conditions its captures hold. Of
    its copies `unseen` were served by no capture, or replaced since: what sites they have is not known.
    """

    kind: str
    module: str
    count: int
    status: str
    captures: int
    reason: str = ""
    breaks: tuple[str, ...] = ()
    guards: tuple[str, ...] = ()
    unseen: int = dataclasses.field(default=0, metadata=CAME_LATER)


@dataclasses.dataclass(frozen=True)
class Fallback:
    """A call that ran the stock path although fxopt would have served it, how often and why."""

    region: str
    reason: str
    count: int


Measure = Callable[[], tuple[tuple[Work | None, Work | None], ...]]
"""Returns the work of each graph of a report, before and after."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What fxopt found and did in one model; `print(report)` is the graph diff as text.

    `lowering` is what the compiled graphs run under, "inductor, plain" where these differ, and what was
    asked for where none is compiled yet; `patterns` are the names of those in use. `plans` say what the blocks save
    for backward, each a record whose `str` is its table. `elsewhere` are the rewrites at no site. Of a `stock`
    model all is what `fxopt.optimize` would do. `measure` returns the work of each graph, None where that is known.
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
    patterns: tuple[str, ...] = ()
    plans: tuple[Plan, ...] = ()
    elsewhere: tuple[RewriteElsewhere, ...] = dataclasses.field(default=(), metadata=CAME_LATER)
    stock: bool = dataclasses.field(default=False, metadata=CAME_LATER)
    measure: Measure | None = dataclasses.field(default=None, repr=False, compare=False)

    def measured(self) -> Report:
        """Return the report with the work of its graphs, which takes up to a second a graph and is done when shown."""
        if self.measure is None:
            return self
        pairs = zip(self.graphs, self.measure(), strict=True)
        graphs = tuple(
            dataclasses.replace(graph, work_before=work[0], work_after=work[1]) for graph, work in pairs
        )
        return dataclasses.replace(self, graphs=graphs, measure=None)

    def to_json(self) -> str:
        """Return the whole report as JSON text, of the form that `docs/report.md` describes."""
        fields = dataclasses.asdict(self.measured())
        del fields["measure"]
        return json.dumps(_in_json({"schema": SCHEMA, **fields}), indent=2, allow_nan=False)

    def why_not(self, name: str) -> str:
        """Return why sites of the form `name` were left as they are: per place the nearest miss and both graphs.

        Raises:
            UnknownNameError: neither a pattern in use nor a form in the report.
        """
        from fxopt.report.why_not import render_why_not

        return render_why_not(self, name)

    def save_html(self, path: str | Path) -> None:
        """Write the report to `path` as one HTML file that needs no network and no other file."""
        from fxopt.report.html import save_html

        save_html(self.measured(), path)

    def _repr_html_(self) -> str:
        from fxopt.report.html import render_notebook

        return render_notebook(self.measured())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the report in IPython, and beside the HTML in a notebook, as its text."""
        printer.text(str(self))

    def __str__(self) -> str:
        """Return the report as text, as `report.text.render_text` formats it."""
        from fxopt.report.text import render_text

        return render_text(self.measured())


def _in_json(value: Any) -> Any:
    """Return `value` with its floats that are not finite as text, for JSON has no number for these."""
    match value:
        case dict():
            return {key: _in_json(item) for key, item in typing.cast("dict[str, Any]", value).items()}
        case list() | tuple():
            return [_in_json(item) for item in typing.cast("list[Any]", value)]
        case float() if not math.isfinite(value):
            return str(value)
        case _:
            return value
