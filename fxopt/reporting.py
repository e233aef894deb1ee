"""From what the passes and the running model recorded to the report that a user reads."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from fxopt.capture.installation import Installation
from fxopt.capture.ledger import Capture
from fxopt.report.records import (
    MODEL_REGION,
    MismatchRecord,
    RegionRecord,
    Report,
    RewriteElsewhere,
    Site,
)


def build_report(installation: Installation) -> Report:
    """Return the report of one optimized model: sites counted over the layers they stand for.

    What served a block that is in the model no longer is left out.
    """
    ledger = installation.ledger
    lost = installation.find_lost()
    served = [
        (path, capture)
        for path in (*(path for path, _ in installation.regions.blocks), MODEL_REGION)
        for capture in ledger.served.get(path, ())
        if path not in lost
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
        regions=_regions(installation, lost),
        fallbacks=ledger.fallback_records(),
        notes=(
            *ledger.notes,
            *_notes_on_slots(installation),
            *_notes_on_lost(installation, lost),
            *(planner.notes if planner else ()),
        ),
        lowering=", ".join(sorted(ledger.lowerings)) or installation.options.lowering,
        patterns=tuple(pattern.name for pattern in installation.options.patterns),
        plans=planner.plans if planner else (),
        elsewhere=_count_elsewhere(served),
        measure=lambda: tuple(capture.outcome.measure() for capture in used),
    )


def build_probe_report(probe: Installation) -> Report:
    """Return the report of a look: what ran stock in it is no fallback of the user's calls, but a note."""
    report = build_report(probe)
    told = {region.reason for region in report.regions}
    notes = tuple(
        f"calls like the one looked at run the stock path in "
        f"{'the model' if fallback.region == MODEL_REGION else fallback.region}: {fallback.reason}"
        for fallback in report.fallbacks
        if fallback.reason not in told
    )
    return dataclasses.replace(report, fallbacks=(), notes=(*notes, *report.notes))


def _notes_on_slots(installation: Installation) -> tuple[str, ...]:
    """Return a line for each region that somebody else compiled after fxopt was installed."""
    return tuple(
        f"{path or 'the model'} was compiled by module.compile() after fxopt.optimize: fxopt does not see its calls"
        for path in installation.find_replaced()
    )


def _notes_on_lost(installation: Installation, lost: Sequence[str]) -> tuple[str, ...]:
    """Return a line for each of the paths of blocks that are in the model no longer."""
    return tuple(
        f"{path} was taken out of the model after fxopt.optimize"
        if installation.is_taken_out(path)
        else f"{path} was replaced after fxopt.optimize: what is there now is not captured as a block; "
        "fxopt.optimize(model) again takes it in"
        for path in lost
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


def _regions(installation: Installation, lost: Sequence[str]) -> tuple[RegionRecord, ...]:
    """Return a record of each stack of blocks, and of the model for what stands around them."""
    stacks = installation.regions.stacks
    blocks = (_region("block", stack.path, stack.paths, installation, lost) for stack in stacks)
    return (*blocks, _region("model", MODEL_REGION, (MODEL_REGION,), installation, lost))


def _region(
    kind: str, region: str, paths: Sequence[str], installation: Installation, lost: Sequence[str]
) -> RegionRecord:
    """Return the record of the `region` that stands for what is at `paths`, those taken out since left out."""
    ledger = installation.ledger
    captures = [capture for capture in ledger.captures if capture.region == region]
    refused = ledger.refused.get(region, "")
    breaks = tuple(dict.fromkeys(capture.broken for capture in captures if capture.broken))
    if not breaks and not refused and region in ledger.broken:
        breaks = (ledger.broken[region],)
    there = [path for path in paths if path not in lost or not installation.is_taken_out(path)]
    unseen = [path for path in there if path in lost or path not in ledger.served]
    if there and not refused and not any(path in ledger.served for path in there):
        counted = {reason: count for (where, reason), count in ledger.fallbacks.items() if where == region}
        refused = max(counted, key=counted.__getitem__, default="")
    return RegionRecord(
        kind=kind,
        module="" if kind == "model" else paths[0],
        count=len(there),
        status="stock" if refused else "captured" if captures else "pending",
        captures=len(captures),
        reason=refused,
        breaks=breaks,
        guards=installation.guards_of(region),
        unseen=len(unseen),
    )
