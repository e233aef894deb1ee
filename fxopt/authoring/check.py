"""The proofs of a pattern, run: examples, gradients, near misses, spelling variants and mutations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.authoring.differences import find_difference, run_both_ways
from fxopt.authoring.variants import mutations, spellings
from fxopt.graph.canonicalize import canonicalize
from fxopt.graph.edit import copy_of
from fxopt.graph.torch_private import free_sizes
from fxopt.graph.verify import note_placeholders, verify
from fxopt.pipeline import ALL
from fxopt.rewriting.failures import cure_of, find_fault, function_place, kinds_of, said_by
from fxopt.rewriting.functions import capture
from fxopt.rewriting.near_miss import find_nearest_miss
from fxopt.rewriting.pattern import Example, Mismatch, Pattern
from fxopt.rewriting.proof import Prover
from fxopt.rewriting.rewrite import MatchContext, RewriteResult, apply_patterns
from fxopt.rewriting.trees import items_of

DEVICE = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was checked: its kind, what of, whether it holds, and the figures or what is wrong."""

    kind: str
    subject: str
    holds: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.holds else 'FAILED'} {self.kind}, {self.subject}: {self.detail}"


def check_pattern(pattern: Pattern) -> tuple[Finding, ...]:
    """Return what the proofs of `pattern` found, on the CPU.

    An example must be rewritten once, and equal stock in outputs and all gradients, in larger sizes too; a near miss
    must be left alone for its reason. Of each example, every other spelling by the canonicalizer's laws must be
    rewritten too, and every mutation be left alone or computed as it stands.
    """
    return tuple(_find_all(pattern))


def _find_all(pattern: Pattern) -> Iterator[Finding]:
    examples = list(_cases("example", pattern.examples))
    if not examples:
        yield Finding(
            "example", pattern.name, False, "expected at least one example, got none; give examples"
        )
    for found in examples:
        yield from (found,) if isinstance(found, Finding) else _check_example(pattern, *found)
    for found in _cases("near miss", pattern.near_misses):
        yield found if isinstance(found, Finding) else _check_near_miss(pattern, *found)
    for found in _cases("mutations", pattern.mutations):
        yield found if isinstance(found, Finding) else _check_own_mutation(pattern, *found)


def _cases(kind: str, given: Callable[[torch.device], Iterable[Any]]) -> Iterator[tuple[Any, ...] | Finding]:
    """Yield what a pattern's author gives to prove it, a finding where that raises or has another form."""
    name = getattr(given, "__name__", kind)
    form = f"expected (name, (function, arguments){', reason' if kind == 'near miss' else ''})"
    try:
        cases = list(given(DEVICE))
    except Exception as error:
        where = function_place(given, error)
        yield Finding(kind, name, False, f"{where}: {form}, got {said_by(error)}; yield that")
        return
    for case in cases:
        match items_of(case):
            case (str(), (function, tuple() | list()), *reason) if callable(function) and list(
                map(type, reason)
            ) == [str] * (kind == "near miss"):
                yield items_of(case)
            case values:
                where = function_place(given)
                yield Finding(kind, name, False, f"{where}: {form}, got ({kinds_of(values)}); yield that")


def _check_example(pattern: Pattern, name: str, example: Example) -> Iterator[Finding]:
    function, inputs = example
    try:
        stock, values = capture(function, inputs)
    except Exception as error:
        yield Finding("example", name, False, _not_captured(function, inputs, error))
        return
    try:
        run_both_ways(stock, values)
    except Exception as error:
        where, cure = function_place(function), cure_of(error, "mend the function")
        yield Finding("example", name, False, f"{where}: expected it to run, got {said_by(error)}; {cure}")
        return
    gm, result = _rewrite(stock, pattern)
    done = [rewrite for rewrite in result.rewrites if rewrite.match.pattern is pattern]
    if len(done) != 1:
        yield Finding("example", name, False, _why_not_once(pattern, function, stock, gm, result, len(done)))
        return
    proof = done[0].proof
    assert proof is not None
    yield Finding(
        "example", name, True, f"rewritten once, error {proof.error:.1e}, stock's own {proof.stock_error:.1e}"
    )
    gradients = [compared for compared in proof.compared if "gradient" in compared]
    shown = ", ".join(dict.fromkeys(each.removesuffix(" in float32") for each in gradients))
    yield Finding("gradients", name, True, f"{shown or 'none to compare'}; worst {proof.worst}")
    error = find_difference(stock, gm, values)
    yield Finding("whole", name, not error, error or "outputs and gradients equal stock's")
    yield _check_sizes(pattern, name, example)
    yield _check_spellings(pattern, name, stock, values)
    yield _check_mutations(pattern, name, list(mutations(stock)), values)


def _check_sizes(pattern: Pattern, name: str, example: Example) -> Finding:
    """Return what the proof finds where sizes are free: it then has more rows, and columns, than the example."""
    reason = "with free ones it is another form"
    for leading_only in (False, True):  # many an op wants to know its columns
        function, inputs = example
        inputs = tuple(_free(value, leading_only) for value in inputs)
        try:
            stock, _ = capture(function, inputs, dynamic=None)
            _, result = _rewrite(stock, pattern)
        except Exception as error:
            reason = f"free ones cannot be captured: {said_by(error)}"
            continue
        refused = [r for r in result.refused if r.pattern == pattern.name]
        proofs = [r.proof for r in (*result.rewrites, *refused) if r.proof is not None]
        if proofs:
            shapes, wrong = ", ".join(proofs[-1].shapes), proofs[-1].reason
            # Where rows are free, as many as the proof takes are tried: two sizes.
            held = (
                f"{shapes} too" if " and " in shapes else f"{shapes} alone: with more rows it is another form"
            )
            told = f"{shapes}: {refused[-1].told}" if wrong else f"proven at {held}"
            return Finding("sizes", name, not wrong, told)
        reason = next((r.reason for r in refused), reason)
    return Finding("sizes", name, True, f"those of the example alone: {reason}")


def _free(value: Any, leading_only: bool) -> Any:
    """Return a copy of `value`, its sizes free where it is a tensor."""
    if not isinstance(value, torch.Tensor):
        return value
    copy = value.detach().clone().requires_grad_(value.requires_grad)
    free_sizes(copy, copy.dim() - leading_only)
    return copy


def _not_captured(function: Any, inputs: Sequence[Any], error: Exception) -> str:
    fault = find_fault(function, inputs)
    if fault is not None:
        return f"{fault.where}: {fault.wrong}; {fault.cure}"
    where, cure = function_place(function, error), cure_of(error, "mend the function")
    return f"{where}: cannot be captured, expected one graph of torch ops, got {said_by(error)}; {cure}"


def _why_not_once(
    pattern: Pattern,
    function: Any,
    stock: fx.GraphModule,
    gm: fx.GraphModule,
    result: RewriteResult,
    number: int,
) -> str:
    where = function_place(function)
    if number:
        return f"{where}: expected one rewrite, got {number}; give an example that holds the form once"
    refused = [refusal for refusal in result.refused if refusal.pattern == pattern.name]
    if refused:
        return f"{where}: it matches, and is refused: {refused[0].told}"
    reason = next((miss.reason for miss in _misses(pattern, stock, gm)), "it computes nothing")
    return f"{where}: expected one rewrite, got none: {reason}; mend the search, or give another example"


def _misses(pattern: Pattern, stock: fx.GraphModule, gm: fx.GraphModule) -> list[Mismatch]:
    """Return why `pattern` did not match at each of the stock nodes, the nearest first."""
    names = [node.name for node in stock.graph.nodes if node.op.startswith("call_")]
    found = [find_nearest_miss(gm, pattern, name, lazy_outputs=False) for name in names]
    return sorted(found, key=lambda miss: miss.nearness, reverse=True)


def _check_near_miss(pattern: Pattern, name: str, example: Example, reason: str) -> Finding:
    function, inputs = example
    try:
        stock, _ = capture(function, inputs)
    except Exception as error:
        return Finding("near miss", name, False, _not_captured(function, inputs, error))
    gm, result = _rewrite(stock, pattern)
    if any(rewrite.match.pattern is pattern for rewrite in result.rewrites):
        where = function_place(function)
        wrong = f"{where}: expected to be left alone, got rewritten; narrow the search, or give a check"
        return Finding("near miss", name, False, wrong)
    told = [refusal.reason for refusal in result.refused]
    told += [miss.reason for miss in _misses(pattern, stock, gm)]
    found = next((text for text in told if reason in text), None)
    if found is None:
        got = repr(told[0]) if told else "none"
        wrong = f"{function_place(function)}: left alone, expected the reason {reason!r}, got {got}; state what it says"
        return Finding("near miss", name, False, wrong)
    return Finding("near miss", name, True, found)


def _check_own_mutation(pattern: Pattern, name: str, example: Example) -> Finding:
    function, inputs = example
    try:
        stock, values = capture(function, inputs)
    except Exception as error:
        return Finding("mutations", name, False, _not_captured(function, inputs, error))
    return _check_mutations(pattern, f"its own, {name}", [(name, stock)], values)


def _check_spellings(
    pattern: Pattern, name: str, stock: fx.GraphModule, values: Sequence[torch.Tensor]
) -> Finding:
    missed: list[str] = []
    number = longer = 0
    size = _canonical_size(stock)
    for law, variant in spellings(stock):
        try:
            if find_difference(stock, variant, values):
                continue
        except Exception:  # no program at all
            continue
        if _canonical_size(variant) > size:
            longer += (
                1  # the canonicalizer keeps apart what was added here: a bit, or memory of its own, differs
            )
            continue
        number += 1
        _, result = _rewrite(variant, pattern)
        if not any(rewrite.match.pattern is pattern for rewrite in result.rewrites):
            missed.append(law)
    left = f"; {longer} not asked for, since canonicalization leaves them longer" if longer else ""
    if missed:
        wrong = f"{len(missed)} of {number} are not rewritten: {'; '.join(missed[:5])}{left}"
        return Finding(
            "spellings", name, False, f"{wrong}; a bit of theirs may differ: name both with either(...)"
        )
    return Finding("spellings", name, True, f"{number} other spellings rewritten too{left}")


def _check_mutations(
    pattern: Pattern, name: str, broken: Sequence[tuple[str, fx.GraphModule]], values: Sequence[torch.Tensor]
) -> Finding:
    rewritten = number = 0
    for what, variant in broken:
        try:
            run_both_ways(variant, values)
        except Exception:  # no program at all
            continue
        number += 1
        gm, result = _rewrite(variant, pattern)
        rewritten += bool(result.rewrites)
        error = find_difference(variant, gm, values) if result.rewrites else ""
        if error:
            return Finding(
                "mutations", name, False, f"{what}: rewritten, and no longer what it computes: {error}"
            )
    return Finding(
        "mutations",
        name,
        True,
        f"{number} broken variants: {number - rewritten} left alone, {rewritten} computed as they stand",
    )


def _canonical(stock: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of the stock graph in canonical form."""
    gm = copy_of(stock)
    for new, old in zip(gm.graph.nodes, stock.graph.nodes, strict=True):
        new.meta = dict(old.meta)
    note_placeholders(gm)
    canonicalize(gm)
    return gm


def _canonical_size(stock: fx.GraphModule) -> int:
    return len(_canonical(stock).graph.nodes)


def _rewrite(stock: fx.GraphModule, pattern: Pattern) -> tuple[fx.GraphModule, RewriteResult]:
    """Return a rewritten copy of the stock graph, and what was done."""
    gm = _canonical(stock)
    built_on = {target.__name__ for target in pattern.targets if "fxopt.kernels" in target.__module__}
    used = [*(other for other in ALL if other.name in built_on and other is not pattern), pattern]
    result = apply_patterns(gm, used, MatchContext(prove=Prover().prove))
    verify(gm, "rewrite")
    return gm, result
