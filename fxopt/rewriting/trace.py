"""What a search carries along: the bindings of names, and the failure that came furthest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from fxopt.rewriting.pattern import Mismatch
from fxopt.rewriting.prefilter import Known
from fxopt.rewriting.trees import Escaping, Operation, Target

ELSEWHERE = "as elsewhere"
"""Marks the reason that a name stands for another value already, as it does in the wrong one of two orders."""


@dataclasses.dataclass(frozen=True)
class Bindings:
    """What has been matched so far; binding returns a new one, so that backtracking undoes nothing.

    `values` are the pattern's names, `dims` its named sizes, `nodes` the matched nodes with the
    escape policy of each, `places` where each operation term has matched before, `forgiven` the one
    attribute that did not fit in a search that lets one pass, with its node.
    """

    values: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    dims: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    nodes: Mapping[fx.Node, Escaping | None] = dataclasses.field(
        default_factory=dict[fx.Node, Escaping | None]
    )
    places: Mapping[tuple[int, fx.Node], bool] = dataclasses.field(
        default_factory=dict[tuple[int, fx.Node], bool]
    )
    forgiven: tuple[str, fx.Node] | None = None

    def bind(self, name: str, value: Any) -> Bindings:
        """Return these bindings with `name` bound to `value`."""
        return dataclasses.replace(self, values={**self.values, name: value})

    def enter(self, term: Operation, node: fx.Node) -> Bindings:
        """Return these bindings with `node` among the matched ones."""
        nodes = self.nodes if node in self.nodes else {**self.nodes, node: None}
        places = {**self.places, (id(term), node): True}
        return Bindings(self.values, self.dims, nodes, places, self.forgiven)

    def allow(self, node: fx.Node, policy: Escaping) -> Bindings:
        """Return these bindings with `policy` for reads of `node` from outside."""
        return dataclasses.replace(self, nodes={**self.nodes, node: policy})

    def forgive(self, reason: str, node: fx.Node) -> Bindings:
        """Return these bindings with `reason` as what did not fit, an attribute of `node`."""
        return dataclasses.replace(self, forgiven=(reason, node))


@dataclasses.dataclass
class Trace:
    """How many steps a search took, and the failure that came furthest, the first of equals.

    A search that only wants matches gives `known`, answers of `could_match` that cut it short. One that
    asks why there is none leaves it out, and gives `rare_ops`, which mark the pattern, and the `site`. With
    `forgives` one attribute of a match may be another than the pattern's.
    """

    pattern: str
    rare_ops: frozenset[Target] = frozenset()
    site: fx.Node | None = None
    known: Known | None = None
    forgives: bool = False
    steps: int = 0
    nearest: Mismatch | None = None

    def fail(self, reason: str, nodes: Sequence[fx.Node], bindings: Bindings) -> None:
        """Remember a failure if it came further than those before."""
        has_rare_op = bool(self.rare_ops) and any(node.target in self.rare_ops for node in bindings.nodes)
        has_site = self.site in bindings.nodes
        self.refuse(Mismatch(self.pattern, reason, tuple(nodes), len(bindings.nodes), has_rare_op, has_site))

    def refuse(self, mismatch: Mismatch) -> None:
        """Remember the refusal of a complete match, or a failure judged elsewhere, if it came further."""
        if self.nearest is None or mismatch.nearness > self.nearest.nearness:
            self.nearest = mismatch


def first_matching(alternatives: Sequence[Iterator[Bindings]], trace: Trace) -> Iterator[Bindings]:
    """Yield from `alternatives` in turn; once one matches, why the ones before did not is of no interest."""
    if trace.known is not None:
        for alternative in alternatives:
            yield from alternative
        return
    before = trace.nearest
    failures: list[Mismatch] = []
    for alternative in alternatives:
        trace.nearest = None
        for joined in alternative:
            failures.clear()
            trace.nearest = before
            yield joined
            before, trace.nearest = trace.nearest, None
        if trace.nearest is not None:
            failures.append(trace.nearest)
    trace.nearest = before
    if failures:
        trace.refuse(_join_failures(failures))


def _join_failures(failures: Sequence[Mismatch]) -> Mismatch:
    """Return the failure that came furthest; those that expected different ops at one place become one."""
    furthest = max(failure.nearness for failure in failures)
    failures = [failure for failure in failures if failure.nearness == furthest]
    parts = [failure.reason.removeprefix("expected ").partition(", got ") for failure in failures]
    is_same_place = (
        len({(failure.nodes, got) for failure, (_, _, got) in zip(failures, parts, strict=True)}) == 1
    )
    if is_same_place and all(failure.reason.startswith("expected ") for failure in failures):
        # An alternative may itself be a list of ops.
        names = dict.fromkeys(name for expected, _, _ in parts for name in expected.split(" or "))
        return dataclasses.replace(failures[0], reason=f"expected {' or '.join(names)}, got {parts[0][2]}")
    leaves = [failure for failure in failures if not failure.reason.startswith("expected ")]
    telling = (failure for failure in leaves if ELSEWHERE not in failure.reason)
    return next(telling, (leaves or failures)[0])
