"""From what the passes did in one graph to its sites, and to why a pattern left one alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import fx

from fxopt.graph.anchors import KINDS, Anchor
from fxopt.graph.view import find_subgraphs, location_of, module_of
from fxopt.report.records import GraphRecord, MismatchRecord, Proof, RewriteElsewhere, Site, Work
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
    taken_in_part = {anchor.node for anchor in anchors if _is_less(anchor, result)}
    before = canonical() if (own_forms or taken_in_part) and canonical is not None else gm
    sites: list[Site] = []
    backends: list[Backend] = []
    mismatches: list[MismatchRecord] = []
    for anchor in anchors:
        # The last: a later pattern may take what an earlier one made.
        rewrite = next((r for r in reversed(result.rewrites) if anchor.node in r.origins), None)
        backends.append(rewrite.backend if rewrite is not None else None)
        if rewrite is not None:
            less = ""
            if anchor.node in taken_in_part:
                refused = next((r for r in result.refused if _is_own(r, anchor)), None)
                if refused is not None:
                    miss = _refused_miss(before, refused)
                else:
                    miss = _find_own_miss(before, anchor, patterns, lazy_outputs, disabled)
                miss = _placed(miss, anchor.location)
                less = _told(miss)
                proof = None if refused is None else refused.proof
                mismatches.append(
                    _miss_record(miss, patterns, anchor.module, anchor.location, anchor.kind, proof)
                )
            sites.append(_site(anchor, "rewritten", rewrite.record.op, less, rewrite.proof))
            continue
        refusals = [r for r in result.refused if anchor.node in r.origins]
        if refusals:
            refused = next((r for r in refusals if _is_own(r, anchor)), refusals[0])
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


def _is_less(anchor: Anchor, result: RewriteResult) -> bool:
    """Return whether only patterns of forms that are part of the form of `anchor` took its place."""
    takers = [r.match.pattern for r in result.rewrites if anchor.node in r.origins]
    return bool(takers) and all(anchor.kind in taker.part_of for taker in takers)


def _is_own(refusal: Refusal, anchor: Anchor) -> bool:
    """Return whether `refusal` is that of the own pattern of `anchor` at its place."""
    return refusal.pattern == anchor.kind and anchor.node in refusal.origins


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
    return find_nearest_miss(gm, own, anchor.node, lazy_outputs, anchor.form)


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
    miss: Mismatch,
    patterns: Sequence[Any],
    module: str,
    location: str,
    anchor: str = "",
    proof: Proof | None = None,
) -> MismatchRecord:
    """Return `miss` as a record with the two small graphs that show it."""
    pattern = next((pattern for pattern in patterns if pattern.name == miss.pattern), None)
    near = find_near(miss)
    wanted = render_wanted(pattern, near) if pattern is not None and near else ""
    found = render_found(near, miss.nodes)
    return MismatchRecord(
        miss.pattern, miss.reason, module, location, miss.progress, anchor, wanted, found, proof=proof
    )


def _refused_elsewhere(gm: fx.GraphModule, refusal: Refusal, patterns: Sequence[Any]) -> MismatchRecord:
    """Return the record of a match refused at no site, or of a form that the search for sites does not know."""
    miss = _refused_miss(gm, refusal)
    module, location = (module_of(miss.nodes[0]), location_of(miss.nodes[0])) if miss.nodes else ("", "")
    return _miss_record(miss, patterns, module, location, proof=refusal.proof)


def _refused_miss(gm: fx.GraphModule, refusal: Refusal) -> Mismatch:
    """Return a refused match as a mismatch, with the first of its nodes whose line is known, if any is."""
    reason = f"the whole form matches, and is refused: {refusal.told}"
    nodes = (node for _, part in find_subgraphs(gm) for node in part.graph.nodes if location_of(node))
    own = (node for node in nodes if not refusal.origins.isdisjoint(node.meta.get("origins", ())))
    return Mismatch(refusal.pattern, reason, tuple(itertools.islice(own, 1)), refusal.num_nodes)


def _site(anchor: Anchor, status: Any, op: str, reason: str, proof: Any) -> Site:
    return Site(anchor.kind, op, 1, status, anchor.module, anchor.location, reason, proof)
