"""From what the passes and the running model recorded to the report a user reads."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import fx

from fxopt.capture.installation import Installation
from fxopt.capture.ledger import Capture
from fxopt.graph.anchors import KINDS, Anchor
from fxopt.graph.view import find_subgraphs, location_of, module_of
from fxopt.report.records import (
    MODEL_REGION,
    GraphRecord,
    MismatchRecord,
    RegionRecord,
    Report,
    RewriteElsewhere,
    Site,
    Work,
)
from fxopt.rewriting.near_miss import find_nearest_miss
from fxopt.rewriting.near_places import find_near_places
from fxopt.rewriting.pattern import Mismatch
from fxopt.rewriting.rewrite import Refusal, RewriteResult
from fxopt.rewriting.small_graphs import find_near, render_found, render_wanted

Backend = Callable[[], str] | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the passes found and did in one graph; modules are named from the region's root.

    `backends` holds for each site what tells its backend, None where the op has but one; `measure` returns the work of
    the graph before and after.
    """

    sites: tuple[Site, ...]
    mismatches: tuple[MismatchRecord, ...]
    graph: GraphRecord
    backends: tuple[Backend, ...]
    measure: Callable[[], tuple[Work | None, Work | None]]
    elsewhere: tuple[RewriteElsewhere, ...] = ()


def find_sites(
    gm: fx.GraphModule,
    anchors: Sequence[Anchor],
    result: RewriteResult,
    patterns: Sequence[Any],
    lazy_outputs: bool,
    disabled: Collection[str] = (),
    canonical: Callable[[], fx.GraphModule] | None = None,
) -> tuple[tuple[Site, ...], tuple[MismatchRecord, ...], tuple[Backend, ...]]:
    """Return one site per anchor of the stock graph, for each that no pattern took its nearest miss, and backends.

    A site whose own pattern did not take it while that of a smaller form did (a loss without its head) has the reason
    too. `canonical` makes `gm` as it was before the rewrites: what is told of patterns that others kept from a place
    is found there, and so are the places of forms of the user's own.
    """
    own_forms = find_own_forms(patterns)
    are_less = any(_is_less(anchor, result, patterns) for anchor in anchors)
    before = canonical() if (own_forms or are_less) and canonical is not None else gm
    sites: list[Site] = []
    backends: list[Backend] = []
    mismatches: list[MismatchRecord] = []
    for anchor in anchors:
        # The last: a later pattern may take what an earlier one made.
        rewrite = next((r for r in reversed(result.rewrites) if anchor.node in r.origins), None)
        backends.append(rewrite.backend if rewrite is not None else None)
        if rewrite is not None:
            less = ""
            if _is_less(anchor, result, patterns):
                miss = _find_own_miss(before, anchor, patterns, lazy_outputs, disabled)
                miss = _placed(miss, anchor.location)
                less = _told(miss)
                mismatches.append(_miss_record(miss, patterns, anchor.module, anchor.location, anchor.kind))
            sites.append(_site(anchor, "rewritten", rewrite.record.op, less, rewrite.proof))
            continue
        refusals = [r for r in result.refused if anchor.node in r.origins]
        if refusals:
            refused = next((r for r in refusals if r.pattern == anchor.kind), refusals[0])
            reason = (
                refused.reason if refused.pattern == anchor.kind else f"{refused.pattern}: {refused.reason}"
            )
            sites.append(_site(anchor, "refused", "", reason, refused.proof))
            continue
        miss = _placed(_find_own_miss(gm, anchor, patterns, lazy_outputs, disabled), anchor.location)
        sites.append(_site(anchor, "unmatched", "", _told(miss), None))
        mismatches.append(_miss_record(miss, patterns, anchor.module, anchor.location, anchor.kind))
    known = {anchor.node for anchor in anchors}
    names = {pattern.name for pattern in own_forms}
    for refusal in result.refused:
        if refusal.pattern in names or known.isdisjoint(refusal.origins):
            mismatches.append(_refused_elsewhere(gm, refusal, patterns))
    for pattern in own_forms:
        mismatches += _misses_of(before, pattern, result, lazy_outputs)
    return tuple(sites), tuple(mismatches), tuple(backends)


def _is_less(anchor: Anchor, result: RewriteResult, patterns: Sequence[Any]) -> bool:
    """Return whether only a pattern of a smaller form took the place of `anchor`: one that comes after its own.

    What stands before its own in `patterns` is of a larger form, which needs no reason.
    """
    names = [pattern.name for pattern in patterns]
    takers = [r.match.pattern.name for r in result.rewrites if anchor.node in r.origins]
    place = names.index(anchor.kind) if anchor.kind in names else -1
    return bool(takers) and anchor.kind not in takers and all(names.index(name) > place for name in takers)


def _find_own_miss(
    gm: fx.GraphModule, anchor: Anchor, patterns: Sequence[Any], lazy_outputs: bool, disabled: Collection[str]
) -> Mismatch:
    """Return why the pattern of the form that `anchor` has in the stock arithmetic did not take it.

    Another pattern is of another form, and what it lacks here is no reason.
    """
    if anchor.kind in disabled:
        return Mismatch(anchor.kind, "disabled by the options")
    own = next((pattern for pattern in patterns if pattern.name == anchor.kind), None)
    if own is None:
        return Mismatch("", f"{anchor.kind} is not among the patterns given")
    return find_nearest_miss(gm, own, anchor.node, lazy_outputs)


def _told(miss: Mismatch) -> str:
    return f"{miss.pattern}: {miss.reason}" if miss.pattern else miss.reason


def _placed(miss: Mismatch, location: str) -> Mismatch:
    """Return `miss` with the line of what did not fit, where that is another than the place's own `location`."""
    lines = [line for node in miss.nodes if (line := location_of(node))]
    if not lines or lines[-1] == location:
        return miss
    return dataclasses.replace(miss, reason=f"{miss.reason}, at {lines[-1]}")


def find_elsewhere(anchors: Sequence[Anchor], result: RewriteResult) -> tuple[RewriteElsewhere, ...]:
    """Return the rewrites at none of `anchors`; where a later one took what an earlier one made, the later alone."""
    known = {anchor.node for anchor in anchors}
    found: list[RewriteElsewhere] = []
    for place, rewrite in enumerate(result.rewrites):
        later = result.rewrites[place + 1 :]
        if known.isdisjoint(rewrite.origins) and not any(rewrite.origins <= r.origins for r in later):
            record, module = rewrite.record, module_of(rewrite.match.outputs[0])
            found.append(
                RewriteElsewhere(record.pattern, record.op, 1, module, record.location, rewrite.proof)
            )
    return tuple(found)


def find_own_forms(patterns: Iterable[Any]) -> list[Any]:
    """Return the patterns of forms that the search for sites does not know."""
    return [p for p in patterns if p.name not in KINDS and not _is_built_on_ops(p)]


def _is_built_on_ops(pattern: Any) -> bool:
    """Return whether a pattern looks for what others made of a site: that site is told with these."""
    return any(getattr(target, "__module__", "").startswith("fxopt.kernels") for target in pattern.targets)


def _misses_of(
    canonical: fx.GraphModule, pattern: Any, result: RewriteResult, lazy_outputs: bool
) -> list[MismatchRecord]:
    """Return where a pattern of a form that the search for sites does not know came near, and what took its place."""
    refused = [refusal.origins for refusal in result.refused if refusal.pattern == pattern.name]
    taken = {origin: r.match.pattern.name for r in result.rewrites for origin in r.origins}
    near = find_near_places(canonical, pattern, lazy_outputs, frozenset[str]().union(*refused), taken)
    return [
        _miss_record(_placed(miss, location_of(node)), (pattern,), module_of(node), location_of(node))
        for miss, node in near
    ]


def _miss_record(
    miss: Mismatch, patterns: Sequence[Any], module: str, location: str, anchor: str = ""
) -> MismatchRecord:
    """Return `miss` as a record with the two small graphs that show it."""
    pattern = next((pattern for pattern in patterns if pattern.name == miss.pattern), None)
    near = find_near(miss)
    wanted = render_wanted(pattern, near) if pattern is not None and near else ""
    found = render_found(near, miss.nodes)
    return MismatchRecord(miss.pattern, miss.reason, module, location, miss.progress, anchor, wanted, found)


def _refused_elsewhere(gm: fx.GraphModule, refusal: Refusal, patterns: Sequence[Any]) -> MismatchRecord:
    """Return the record of a refused match of a form that the search for sites does not know: a user's own."""
    reason = f"the whole form matches, and is refused: {refusal.told}"
    for _, part in find_subgraphs(gm):
        for node in part.graph.nodes:
            if not refusal.origins.isdisjoint(node.meta.get("origins", ())) and location_of(node):
                miss = Mismatch(refusal.pattern, reason, (node,), refusal.num_nodes)
                return _miss_record(miss, patterns, module_of(node), location_of(node))
    return MismatchRecord(refusal.pattern, reason, "", "", refusal.num_nodes)


def _site(anchor: Anchor, status: Any, op: str, reason: str, proof: Any) -> Site:
    return Site(anchor.kind, op, 1, status, anchor.module, anchor.location, reason, proof)


def build_report(installation: Installation) -> Report:
    """Return the report of one optimized model: sites counted over the layers they stand for."""
    ledger = installation.ledger
    served = [
        (path, capture)
        for path in (*(path for path, _ in installation.regions.blocks), MODEL_REGION)
        for capture in ledger.served.get(path, ())
    ]
    used = tuple({id(capture): capture for _, capture in served}.values())
    layers = collections.Counter(id(capture) for _, capture in served)
    graphs = tuple(
        dataclasses.replace(
            capture.outcome.graph,
            region=capture.region,
            capture=capture.number,
            layers=layers[id(capture)],
        )
        for capture in used
    )
    planner = installation.planner
    return Report(
        model=type(installation.model).__name__,
        sites=_count_sites(served),
        rewrites=tuple(rewrite for graph in graphs for rewrite in graph.rewrites),
        mismatches=_count_misses(served),
        passes=tuple(record for graph in graphs for record in graph.passes),
        graphs=graphs,
        regions=_regions(installation),
        fallbacks=ledger.fallback_records(),
        notes=(*ledger.notes, *_notes_on_slots(installation), *(planner.notes if planner else ())),
        lowering=", ".join(sorted(ledger.lowerings)) or installation.options.lowering,
        patterns=tuple(pattern.name for pattern in installation.options.patterns),
        plans=planner.plans if planner else (),
        elsewhere=_count_elsewhere(served),
        measure=lambda: tuple(capture.outcome.measure() for capture in used),
    )


def _notes_on_slots(installation: Installation) -> tuple[str, ...]:
    """Return a line for each region that somebody else compiled after fxopt was installed."""
    return tuple(
        f"{path or 'the model'} was compiled by module.compile() after fxopt.optimize: fxopt does not see its calls"
        for path in installation.find_replaced()
    )


def _count_sites(served: Sequence[tuple[str, Capture]]) -> tuple[Site, ...]:
    """Return the sites of all layers, equal ones of different layers merged into one with their count."""
    first: dict[tuple[Any, ...], Site] = {}
    backends: dict[tuple[Any, ...], dict[str, None]] = collections.defaultdict(dict)
    counts: collections.Counter[tuple[Any, ...]] = collections.Counter()
    seen_in: dict[str, collections.Counter[tuple[Any, ...]]] = {}
    for path, capture in served:
        prefix = "" if path == MODEL_REGION else path
        seen = seen_in.setdefault(path, collections.Counter())
        for site, backend in zip(capture.outcome.sites, capture.outcome.backends, strict=True):
            key = (
                capture.region,
                site.pattern,
                site.op,
                site.status,
                site.module,
                site.location,
                site.reason,
            )
            seen[key] += 1
            key = (*key, seen[key])
            counts[key] += 1
            if backend is not None:
                backends[key].setdefault(backend())
            module = ".".join(part for part in (prefix, site.module) if part)
            first.setdefault(key, dataclasses.replace(site, module=module))
    return tuple(
        dataclasses.replace(site, count=counts[key], backend="; ".join(backends[key]))
        for key, site in first.items()
    )


def _count_misses(served: Sequence[tuple[str, Capture]]) -> tuple[MismatchRecord, ...]:
    """Return the misses of all layers, those of one module and line merged with their count, named from the model."""
    first: dict[tuple[Any, ...], MismatchRecord] = {}
    counts: collections.Counter[tuple[Any, ...]] = collections.Counter()
    for path, capture in served:
        prefix = "" if path == MODEL_REGION else path
        for place, miss in enumerate(capture.outcome.mismatches):
            same = capture.outcome.mismatches[:place].count(miss)
            key = (capture.region, miss.anchor, miss.pattern, miss.module, miss.location, miss.reason, same)
            counts[key] += 1
            module = ".".join(part for part in (prefix, miss.module) if part)
            first.setdefault(key, dataclasses.replace(miss, module=module))
    return tuple(dataclasses.replace(miss, count=counts[key]) for key, miss in first.items())


def _count_elsewhere(served: Sequence[tuple[str, Capture]]) -> tuple[RewriteElsewhere, ...]:
    """Return the rewrites at no site of all layers, equal ones merged with their count, named from the model."""
    first: dict[tuple[Any, ...], RewriteElsewhere] = {}
    counts: collections.Counter[tuple[Any, ...]] = collections.Counter()
    for path, capture in served:
        prefix = "" if path == MODEL_REGION else path
        seen: collections.Counter[tuple[Any, ...]] = collections.Counter()
        for rewrite in capture.outcome.elsewhere:
            key = (capture.region, rewrite.pattern, rewrite.op, rewrite.module, rewrite.location)
            seen[key] += 1
            key = (*key, seen[key])
            counts[key] += 1
            module = ".".join(part for part in (prefix, rewrite.module) if part)
            first.setdefault(key, dataclasses.replace(rewrite, module=module))
    return tuple(dataclasses.replace(rewrite, count=counts[key]) for key, rewrite in first.items())


def _regions(installation: Installation) -> tuple[RegionRecord, ...]:
    ledger = installation.ledger
    captures = collections.Counter(capture.region for capture in ledger.captures)
    records: list[RegionRecord] = []
    named = [
        ("block", stack.path, stack.paths[0], len(stack.blocks)) for stack in installation.regions.stacks
    ]
    for kind, region, module, count in (*named, ("model", MODEL_REGION, "", 1)):
        refused = ledger.refused.get(region, "")
        status = "stock" if refused else "captured" if captures[region] else "pending"
        breaks = tuple(dict.fromkeys(c.broken for c in ledger.captures if c.region == region and c.broken))
        records.append(
            RegionRecord(
                kind, module, count, status, captures[region], refused, breaks, installation.guards_of(region)
            )
        )
    return tuple(records)
