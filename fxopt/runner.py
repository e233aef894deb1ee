"""The runner of passes: it alone times, verifies and snapshots; passes do their one thing."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

from torch import fx

from fxopt.graph.anchors import find_anchors
from fxopt.graph.lift import check_taken, lift_loops
from fxopt.graph.node_records import node_records
from fxopt.graph.python import to_python
from fxopt.graph.snapshot import snapshot
from fxopt.graph.strides import note_orders
from fxopt.graph.verify import note_items, note_placeholders, verify
from fxopt.graph.work import ambient_autocast, kept_for_work, measure_work
from fxopt.options import Options
from fxopt.report.records import MODEL_REGION, GraphRecord, PassRecord
from fxopt.rewriting.proof import Prover
from fxopt.rewriting.rewrite import RewriteResult
from fxopt.sites import Outcome, find_elsewhere, find_sites


@dataclasses.dataclass
class Job:
    """One graph on its way through the passes: what they may read, and where they leave their records."""

    options: Options
    region: str
    lazy_outputs: bool
    prover: Prover | None
    result: RewriteResult = dataclasses.field(default_factory=RewriteResult)
    canonical: Callable[[], fx.GraphModule] | None = None
    """Makes the graph as it was before the rewrites."""

    def keep_canonical(self, gm: fx.GraphModule) -> None:
        """Keep `gm` as it is: reports look there for what a pattern would have seen, had no other come first."""
        self.canonical = kept_for_work(gm)


Pass = tuple[str, Callable[[fx.GraphModule, Job], None]]
"""A name, and what changes a graph in place and leaves it valid."""


def run_passes(
    gm: fx.GraphModule,
    *,
    passes: tuple[Pass, ...],
    region: str,
    lazy_outputs: bool,
    options: Options,
    prover: Prover | None,
) -> Outcome:
    """Run `passes` over `gm` in place and return what was found and done.

    Raises:
        VerifyError: a pass left the graph invalid.
        TurnsError: a loop that was captured for one turn is none that a pattern takes.
    """
    loops = lift_loops(gm)
    note_placeholders(gm)
    note_items(gm)
    note_orders(gm)
    anchors = find_anchors(gm)
    before, nodes_before, stock = snapshot(gm), node_records(gm), kept_for_work(gm)
    job = Job(options, region, lazy_outputs, prover)
    records: list[PassRecord] = []
    for name, run in passes:
        start, num_before = time.perf_counter(), len(gm.graph.nodes)
        run(gm, job)
        elapsed_ms = (time.perf_counter() - start) * 1e3
        verify(gm, name)
        records.append(PassRecord(name, round(elapsed_ms, 2), num_before, len(gm.graph.nodes)))
    check_taken(gm, loops)
    gm.recompile()
    sites, mismatches, backends = find_sites(
        gm, anchors, job.result, options.active_patterns, lazy_outputs, options.disable, job.canonical
    )
    rewrites = tuple(rewrite.record for rewrite in job.result.rewrites)
    graph = GraphRecord(
        region,
        0,
        before,
        snapshot(gm),
        rewrites,
        tuple(records),
        nodes_before=nodes_before,
        nodes_after=node_records(gm),
        code=to_python(gm, "tail" if region == MODEL_REGION else "block"),
    )
    rewritten, autocast = kept_for_work(gm), ambient_autocast()
    measure = functools.cache(lambda: (measure_work(stock(), autocast), measure_work(rewritten(), autocast)))
    elsewhere = find_elsewhere(anchors, job.result)
    return Outcome(sites, mismatches, graph, backends, measure, elsewhere)
