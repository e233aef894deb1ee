"""Replace what patterns match, each match judged, priced and proven first, until nothing more matches.

Every rewrite erases a node that no rewrite made, or leaves fewer nodes than it found: the first number never grows,
and where it stays the second falls, so the loop ends. A sweep visits the nodes of each pattern's rarest op only.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.graph.view import find_subgraphs, location_of
from fxopt.report.records import Proof, RewriteRecord
from fxopt.rewriting.cost import check_cost, sizes_in_bytes
from fxopt.rewriting.failures import function_place, said_by
from fxopt.rewriting.legality import GraphState, find_insertion, judge, read_state
from fxopt.rewriting.matcher import find_matches
from fxopt.rewriting.pattern import (
    Call,
    Match,
    Mismatch,
    Pattern,
    Replacement,
)
from fxopt.rewriting.prefilter import Known
from fxopt.rewriting.replacement import (
    OTHERWISE,
    count_calls,
    evaluate_examples,
    find_main_call,
    insert_call,
    share_storages,
)
from fxopt.rewriting.roots import find_climbing_terms, find_rare_ops, find_roots, make_climb_test
from fxopt.rewriting.trace import Trace
from fxopt.rewriting.trees import name_of

Prove = Callable[[Match, Replacement], Proof]


@dataclasses.dataclass(frozen=True)
class MatchContext:
    """What holds around a graph: whether values that only feed its output are lazy, and the prover.

    `prove(match, replacement)` is None where proofs are switched off; `select(match)` returns why a match is to be
    left out, or "".
    """

    lazy_outputs: bool = False
    prove: Prove | None = None
    select: Callable[[Match], str] | None = None


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """One replacement done: names of the nodes that went and came, and the bytes that no longer exist.

    `backend` tells which implementation serves the op, where it chooses while it runs.
    """

    match: Match
    before: tuple[str, ...]
    after: tuple[str, ...]
    saved: int
    record: RewriteRecord
    proof: Proof | None
    origins: frozenset[str]
    backend: Callable[[], str] | None = None


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A match that stays stock, because its proof failed or its replacement could not be built.

    `replacement` is the place of what would have come, and `num_nodes` how many would have gone.
    """

    pattern: str
    reason: str
    origins: frozenset[str]
    proof: Proof | None = None
    replacement: str = ""
    num_nodes: int = 0

    @property
    def told(self) -> str:
        """The reason, with the function that has to be mended where its proof failed."""
        failed = self.proof is not None and bool(self.replacement)
        return f"{self.replacement}: {self.reason}; mend it" if failed else self.reason


@dataclasses.dataclass
class RewriteResult:
    """What `apply_patterns` did and would not do; `num_steps` counts the steps of all searches."""

    rewrites: list[Rewrite] = dataclasses.field(default_factory=list[Rewrite])
    refused: list[Refusal] = dataclasses.field(default_factory=list[Refusal])
    num_steps: int = 0
    num_sweeps: int = 0


def apply_patterns(gm: fx.GraphModule, patterns: Sequence[Pattern], context: MatchContext) -> RewriteResult:
    """Replace every proven match of `patterns` in `gm` and in the bodies of its higher-order ops, in place.

    Patterns are tried in order, again and again until a sweep changes nothing. `gm` must be canonical.
    """
    result = RewriteResult()
    for prefix, body in list(find_subgraphs(gm)):
        # What a body returns is read by the graph around it, so nothing in it is lazy.
        scope = dataclasses.replace(context, lazy_outputs=context.lazy_outputs and not prefix)
        rewriter = _Rewriter(body, scope, result)
        while rewriter.sweep(patterns):
            pass
        body.recompile()
    return result


class _Rewriter:
    """The sweeps over one graph; a match that was refused once is not tried again."""

    def __init__(self, gm: fx.GraphModule, context: MatchContext, result: RewriteResult) -> None:
        self._graph = gm.graph
        self._context = context
        self._result = result
        self._refused: set[tuple[str, fx.Node]] = set()

    def sweep(self, patterns: Sequence[Pattern]) -> bool:
        """Try every pattern once everywhere; return whether the graph changed."""
        num_before = len(self._result.rewrites)
        self._result.num_sweeps += 1
        state = read_state(self._graph)
        known: Known = {}
        for pattern in patterns:
            counts = {target: len(nodes) for target, nodes in state.by_target.items()}
            rare_ops = find_rare_ops(pattern.terms[0], counts) or frozenset()
            may_climb = make_climb_test(find_climbing_terms(pattern.terms[0], rare_ops), known)
            starts = itertools.chain.from_iterable(state.by_target.get(target, ()) for target in rare_ops)
            for start in sorted(starts, key=state.places.__getitem__):
                if start not in state.erased:
                    self._rewrite_at(start, pattern, may_climb, state, known)
        self._result.num_steps += len(known)
        return len(self._result.rewrites) > num_before

    def _rewrite_at(
        self,
        start: fx.Node,
        pattern: Pattern,
        may_climb: Callable[[fx.Node], bool],
        state: GraphState,
        known: Known,
    ) -> None:
        trace = Trace(pattern.name, known=known)
        for root in find_roots(pattern, start, may_climb):
            if (pattern.name, root) in self._refused:
                continue
            match = find_match(pattern, root, start, state, self._context.lazy_outputs, trace)
            if match and self._replace(match, state):
                break
        self._result.num_steps += trace.steps

    def _replace(self, match: Match, state: GraphState) -> bool:
        """Replace `match` and record it; return False where it was refused."""
        proof = None
        if self._context.select is not None and (left_out := self._context.select(match)):
            return self._refuse(match, left_out)
        replacement = _replace_by_author(match)
        if isinstance(replacement, str):
            return self._refuse(match, replacement)
        outputs = replacement if isinstance(replacement, tuple) else (replacement,)
        examples = check_progress(match, outputs) or evaluate_examples(match, outputs)
        reason = (
            examples if isinstance(examples, str) else share_storages(match, outputs, examples, state.written)
        )
        if not reason and self._context.prove is not None:
            proof = self._context.prove(match, replacement)
            reason = "" if proof.passed else proof.reason
        if reason or isinstance(examples, str):
            main = find_main_call(outputs)
            return self._refuse(match, reason, proof, function_place(main.target) if main else "")
        self._result.rewrites.append(self._apply(match, outputs, examples, proof, state))
        return True

    def _refuse(self, match: Match, reason: str, proof: Proof | None = None, place: str = "") -> bool:
        """Record that `match` stays stock, `place` being that of what would have come; return False."""
        name = match.pattern.name
        self._refused.add((name, match.outputs[0]))
        self._result.refused.append(Refusal(name, reason, match.origins, proof, place, len(match.nodes)))
        return False

    def _apply(
        self,
        match: Match,
        outputs: Sequence[Call | fx.Node],
        examples: dict[int, Any],
        proof: Proof | None,
        state: GraphState,
    ) -> Rewrite:
        at = find_insertion(match, state)
        assert at is not None
        location, origins = location_of(match.outputs[0]), match.origins
        backend = match.pattern.backend and match.pattern.backend(match)
        calls: dict[int, fx.Node] = {}
        values = (*match.outputs, *match.exports.values())
        with self._graph.inserting_before(at):
            new = [insert_call(self._graph, item, match, examples, calls) for item in outputs]
        inserted = list(calls.values())
        for node in inserted:
            state.add(node, at)
        inside = set(match.nodes)
        for old, replacement in zip(values, new, strict=True):
            if old in match.outputs:
                old.replace_all_uses_with(replacement)
            else:
                old.replace_all_uses_with(replacement, lambda user: user not in inside)
        for node in match.kept:
            node.meta["kept"] = match.pattern.name
        gone = [node for node in match.nodes if node not in match.kept]
        saved = sizes_in_bytes(gone) - sizes_in_bytes(inserted)
        for node in reversed(gone):
            self._graph.erase_node(node)
            state.erased.add(node)
        main = find_main_call(outputs)
        record = RewriteRecord(
            pattern=match.pattern.name,
            op=name_of(main.target) if main else "",
            before=tuple(node.name for node in gone),
            after=tuple(node.name for node in inserted),
            attributes=_attributes_of(main) if main else {},
            location=location,
        )
        return Rewrite(match, record.before, record.after, saved, record, proof, origins, backend)


def find_match(
    pattern: Pattern, root: fx.Node, start: fx.Node, state: GraphState, lazy_outputs: bool, trace: Trace
) -> Match | None:
    """Return the preferred legal match of `pattern` that contains `start` and whose first output is `root`.

    `trace` remembers why there is none.
    """
    for bindings, outputs in find_matches(pattern, root, trace):
        if start not in bindings.nodes:
            continue
        match = judge(pattern, bindings, outputs, state, lazy_outputs)
        if isinstance(match, Match):
            refusal = _judge_by_author(match)
            if refusal is None:
                return match
            match = refusal
        trace.refuse(match)
    return None


def _judge_by_author(match: Match) -> Mismatch | None:
    """Return what the pattern's own check says, a check that cannot say it being a "no" too."""
    try:
        refusal: Any = match.pattern.check(match)
    except Exception as error:
        place = function_place(match.pattern.check, error)
        return match.fail(f"its check {place} raised {said_by(error)}; mend it")
    if refusal is not None and not isinstance(refusal, Mismatch):
        place = function_place(match.pattern.check)
        return match.fail(
            f"its check {place} returned {refusal!r}, expected None or match.fail(reason, name)"
        )
    # A mismatch is falsy: only None says that the pattern holds.
    return check_cost(match) if refusal is None else refusal


def _replace_by_author(match: Match) -> Replacement | str:
    """Return what the pattern puts in the place of `match`, or why its function gives nothing of the kind."""
    try:
        return match.pattern.replace(match)
    except Exception as error:
        place = function_place(match.pattern.replace, error)
        return f"its replace {place} raised {said_by(error)}; {OTHERWISE}"


def check_progress(match: Match, outputs: Sequence[Call | fx.Node]) -> str:
    """Return why a rewrite brings the end no nearer, "" if it erases a node that no rewrite made, or leaves fewer."""
    gone = [node for node in match.nodes if node not in match.kept]
    if any("rewritten_by" not in node.meta for node in gone) or count_calls(outputs) < len(gone):
        return ""
    return (
        "the match holds nothing but nodes of earlier rewrites, and leaves as many: it could go on for ever"
    )


def _attributes_of(call: Call) -> dict[str, Any]:
    return {
        name: value if isinstance(value, int | float | str | None) else str(value)
        for name, value in call.kwargs.items()
        if not isinstance(value, Call | fx.Node | torch.Tensor)
    }
