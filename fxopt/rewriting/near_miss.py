"""Why a pattern left a place alone: how near it came, and the first constraint that failed.

From above, the search is run again at every node that may be an output over the site. Where none of these
searches comes as far as the site, the pattern is followed from the site itself, down and then up.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import fx

from fxopt.graph import vocabulary
from fxopt.graph.view import find_subgraphs
from fxopt.rewriting.legality import GraphState, read_state
from fxopt.rewriting.matcher import match_term
from fxopt.rewriting.pattern import Mismatch, Pattern
from fxopt.rewriting.prefilter import Known, could_match
from fxopt.rewriting.rewrite import find_match
from fxopt.rewriting.roots import find_rare_ops, find_roots
from fxopt.rewriting.trace import Bindings, Trace, first_matching
from fxopt.rewriting.trees import Operation, Target, Term, children_of, name_of, walk

COMMON: frozenset[Target] = frozenset(
    {torch.add, torch.mul, torch.sub, torch.div, operator.getitem, vocabulary.cast, vocabulary.reshape}
)
"""Ops that every model is full of: that one is there says nothing."""


def find_nearest_miss(
    gm: fx.GraphModule, pattern: Pattern, anchor_origin: str, lazy_outputs: bool = True, form: str = ""
) -> Mismatch:
    """Return the mismatch of `pattern` that came furthest around the stock node `anchor_origin` of `gm`.

    A stock node in the body of a higher-order op is named "submodule/node". Where the pattern has no op of the site,
    the mismatch names ops that it has. `form` is what the site is called there, if not by its op.
    """
    found = list(_find_nodes(gm, anchor_origin))
    states, sites = [state for state, _ in found], tuple(site for _, site in found)
    is_lazy = lazy_outputs and "/" not in anchor_origin
    misses = [miss for state, site in found if (miss := find_miss(pattern, site, state, is_lazy)) is not None]
    lacking = frozenset[Target]().union(*(_find_lacking(pattern, state) for state in states))
    is_common = any(site.target in COMMON for site in sites)
    is_inner = is_common and not any(site.target in pattern.terms[0].heads for site in sites)
    if misses and not (lacking and is_inner):
        return max(misses, key=lambda miss: miss.nearness)
    names = sorted(set(map(name_of, lacking or _ops_to_name(pattern, is_common))))
    expected = f"one of {', '.join(names)}" if len(names) > 1 else names[0]
    got = form or " and ".join(dict.fromkeys(map(_name, sites))) or "nothing"
    return Mismatch(pattern.name, f"expected {expected}, got {got}", sites)


def _ops_to_name(pattern: Pattern, is_common: bool) -> frozenset[Target]:
    """Return which of its ops say best what `pattern` is, for a site of an op that it lacks or that `is_common`."""
    ending = (pattern.needed_ops & pattern.terms[0].heads) - COMMON
    if ending:  # no match is without it, and it is the one that a reader sees last
        return ending
    says_much = pattern.targets - COMMON
    if is_common or not says_much:  # a common op may well be the one that is missing there
        return pattern.targets
    # An op that is called as the pattern is does it all: the others only stand around it, or spell it out.
    return frozenset(target for target in says_much if _is_called(target, pattern.name)) or says_much


def _is_called(target: Target, name: str) -> bool:
    """Return whether an op is called `name`, or that in a longer form, as scaled_dot_product_attention is."""
    called = name_of(target)
    return called == name or called.endswith(f"_{name}")


def _find_lacking(pattern: Pattern, state: GraphState) -> frozenset[Target]:
    """Return the ops that every match contains and the graph does not, less those that say nothing."""
    needed = pattern.needed_ops - COMMON
    return frozenset(target for target in needed if not state.by_target.get(target))


def _find_nodes(gm: fx.GraphModule, origin: str) -> Iterator[tuple[GraphState, fx.Node]]:
    for prefix, body in find_subgraphs(gm):
        found = [
            node for node in body.graph.nodes if origin in node.meta.get("origins", (f"{prefix}{node.name}",))
        ]
        if found:
            state = read_state(body.graph)
            yield from ((state, node) for node in found)


def find_miss(
    pattern: Pattern, site: fx.Node, state: GraphState, lazy_outputs: bool, climbs: bool = False
) -> Mismatch | None:
    """Return why `pattern` does not match around the node `site`, None where it has no such op.

    Where no output of it is above, this is told of the site, or with `climbs` of the node that the way up ends at.
    """
    if site.op != "call_function" or site.target not in pattern.targets:
        return None
    counts = {target: len(nodes) for target, nodes in state.by_target.items()}
    trace = Trace(pattern.name, find_rare_ops(pattern.terms[0], counts) or frozenset(), site)
    roots = find_roots(pattern, site, lambda node: node.target in pattern.targets)
    if not roots:
        broken = _find_break(pattern, site, trace) if climbs else None
        return broken if broken is not None else _end_above(site, pattern.terms[0].heads, 0, trace)
    for root in roots:
        match = find_match(pattern, root, site, state, lazy_outputs, trace)
        if match is not None:
            reason = f"matches {name_of(root.target)} {root.name}, but was not applied"
            return Mismatch(pattern.name, reason, match.outputs, len(match.nodes), True, True)
    nearest = trace.nearest
    # Where no more than the site fitted it was taken for an output: it may be an inner op of another alternative.
    if nearest is not None and nearest.has_site and nearest.progress > 1:
        return nearest
    broken = _find_break(pattern, site, trace)
    if broken is None or (nearest is not None and nearest.has_site and nearest.progress >= broken.progress):
        return nearest
    return broken


def _find_break(pattern: Pattern, site: fx.Node, trace: Trace) -> Mismatch | None:
    """Return what is wrong below `site`, else where the way up from it to an output of `pattern` ends."""
    known: Known = {}
    terms = [term for root in pattern.terms for term in walk(root) if isinstance(term, Operation)]
    node, num_nodes, wanted = site, 1, terms
    while True:
        fitting = [term for term in wanted if could_match(term, node, known)]
        if not fitting:
            return _find_fault_under(node, wanted, num_nodes, trace)
        wanted = [term for term in terms if any(_is_operand(child, term) for child in fitting)]
        targets = {term.target for term in wanted}
        if not targets:
            return None
        readers = [user for user in node.users if user.target in targets]
        if not readers:
            return _end_above(node, targets, num_nodes, trace)
        fits = (user for user in readers if any(could_match(term, user, known) for term in wanted))
        node, num_nodes = next(fits, readers[0]), num_nodes + 1


def _find_fault_under(
    node: fx.Node, terms: Sequence[Operation], num_nodes: int, trace: Trace
) -> Mismatch | None:
    """Return why none of `terms`, some of which call the op of `node`, matches it."""
    below = Trace(trace.pattern, trace.rare_ops)
    same = [term for term in terms if term.target is node.target]
    list(first_matching([match_term(term, node, Bindings(), below) for term in same], below))
    if below.nearest is None:
        return None
    reason = f"under {name_of(node.target)}: {below.nearest.reason}"
    progress = num_nodes - 1 + below.nearest.progress  # the node itself is in both
    return dataclasses.replace(below.nearest, reason=reason, progress=progress, has_site=True)


def _end_above(node: fx.Node, targets: Iterable[Target], num_nodes: int, trace: Trace) -> Mismatch:
    expected = " or ".join(sorted(set(map(name_of, targets))))
    got = " and ".join(dict.fromkeys(map(_name, node.users))) or "nothing"
    reason = f"expected {expected} above {name_of(node.target)}, got {got}"
    return Mismatch(
        trace.pattern, reason, (node, *node.users), num_nodes, node.target in trace.rare_ops, True
    )


def _is_operand(child: Term, term: Operation) -> bool:
    return any(_is_head(child, operand) for operand in children_of(term))


def _is_head(child: Term, term: Term) -> bool:
    """Return whether `child` is an operation at the top of `term`, through alternatives and names."""
    if isinstance(term, Operation):
        return child is term
    return any(_is_head(child, inner) for inner in children_of(term))


def _name(node: fx.Node) -> str:
    if node.op == "output":
        return "the graph's output"
    return name_of(node.target) if node.op == "call_function" else f".{node.target}"
