"""Every pattern on its own examples, near misses and mutations, against the stock graph it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from fxopt.graph.anchors import find_anchors
from fxopt.graph.verify import verify
from fxopt.patterns import ALL, DEQUANTIZE_4BIT
from fxopt.rewriting.near_miss import find_nearest_miss
from fxopt.rewriting.pattern import Pattern
from fxopt.rewriting.proof import Prover
from fxopt.rewriting.rewrite import MatchContext, RewriteResult, apply_patterns

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLD_IN_FULL = ("rms_norm", "glu")
"""Patterns whose near misses give the whole reason; those of the others give a part of it."""
OPS = {"join_lora_linear": "lora_linear", "experts_of_all": "experts"}
"""What a pattern makes that has no op of its own."""
UNUSED = {DEQUANTIZE_4BIT}
"""Patterns whose ops others take along where they are there; examples for those need a library's own op."""
Capture = Callable[..., Any]


def cases(kind: str) -> list[Any]:
    """Return one parameter per case; the case itself is built in the test, from its name."""
    found: list[Any] = []
    for pattern in ALL:
        for name, *_ in getattr(pattern, kind)(torch.device("cpu")):
            found.append(pytest.param(pattern, name, id=f"{pattern.name}-{name.replace(' ', '_')}"))
    return found


def every_third(found: list[Any]) -> list[Any]:
    """Return all cases, two of three as slow ones: each example is taken by itself in another test."""
    return [
        each if place % 3 == 0 else pytest.param(*each.values, id=each.id, marks=pytest.mark.slow)
        for place, each in enumerate(found)
    ]


def case(pattern: Pattern, kind: str, wanted: str) -> Any:
    return next(rest for name, *rest in getattr(pattern, kind)(DEVICE) if name == wanted)


def rewrite(gm: fx.GraphModule, *patterns: Pattern) -> RewriteResult:
    result = apply_patterns(gm, patterns, MatchContext(lazy_outputs=False, prove=Prover().prove))
    verify(gm, "rewrite")
    return result


LOSSES = {"cross_entropy", "linear_cross_entropy"}
"""Kinds of anchors that are one site: which of the two it is lies in what computes the logits."""


def foundations(pattern: Pattern) -> tuple[Pattern, ...]:
    """Return the patterns of the library whose ops `pattern` looks for."""
    built_on = {target.__name__ for target in pattern.targets if "fxopt.kernels" in target.__module__}
    return tuple(other for other in ALL if other.name in built_on and other is not pattern)


@pytest.mark.parametrize(("pattern", "name"), cases("examples"))
def test_an_example_is_rewritten_once_and_equals_stock(capture: Capture, pattern: Pattern, name: str) -> None:
    ((function, inputs),) = case(pattern, "examples", name)
    captured = capture(function, inputs)
    gm = captured.canonical()
    num_before = len(gm.graph.nodes)

    result = rewrite(gm, *foundations(pattern), pattern)

    assert [refusal.reason for refusal in result.refused] == []
    *prepared, done = result.rewrites
    built_on = {earlier.match.pattern for earlier in prepared}
    assert built_on == set(foundations(pattern)) - UNUSED
    assert len(gm.graph.nodes) == num_before + sum(len(r.after) - len(r.before) for r in result.rewrites)
    new = [node for node in gm.graph.nodes if node.meta.get("rewritten_by") == pattern.name]
    assert [node.name for node in new] == list(done.after)
    assert all(done.origins == node.meta["origins"] for node in new)
    assert done.match.pattern is pattern
    assert done.record.op == OPS.get(pattern.name, pattern.name)
    assert done.proof is not None
    assert done.proof.passed
    captured.check_equal(gm)
    again = rewrite(gm, *foundations(pattern), pattern)
    assert (again.rewrites, again.refused) == ([], [])


BESIDE = {"with adapter": {"lora_linear"}}
"""What else is rewritten in an example that shows a form among others."""


@pytest.mark.parametrize(("pattern", "name"), every_third(cases("examples")))
def test_all_patterns_together_take_an_example_once(capture: Capture, pattern: Pattern, name: str) -> None:
    ((function, inputs),) = case(pattern, "examples", name)
    gm = capture(function, inputs).canonical()
    used = [done.match.pattern for done in rewrite(gm, *ALL).rewrites]
    others = [*foundations(pattern), *(other for other in ALL if other.name in BESIDE.get(name, ()))]
    assert [other for other in used if other not in others] == [pattern]


@pytest.mark.parametrize(("pattern", "name"), cases("near_misses"))
def test_a_near_miss_is_left_alone_with_its_reason(capture: Capture, pattern: Pattern, name: str) -> None:
    (function, inputs), reason = case(pattern, "near_misses", name)
    captured = capture(function, inputs)
    gm = captured.canonical()
    done = rewrite(gm, *foundations(pattern), pattern).rewrites
    assert pattern not in [rewritten.match.pattern for rewritten in done]
    assert len(reason.split()) > 1, "one word says nothing"
    found = find_anchors(captured.stock)
    kinds = {pattern.name, *(other.name for other in foundations(pattern))}
    kinds |= LOSSES if pattern.name in LOSSES else set()
    anchors = [anchor.node for anchor in found if anchor.kind in kinds]
    nodes = anchors or [node.name for node in captured.stock.graph.nodes if node.op.startswith("call_")]
    misses = [find_nearest_miss(gm, pattern, node, lazy_outputs=False) for node in nodes]
    # What is no site in the stock arithmetic has its reason where the pattern came furthest.
    told = misses if anchors else [max(misses, key=lambda miss: miss.nearness)]
    assert all(len(miss.reason.split()) > 1 for miss in told), "each place has a reason"
    if pattern.name in TOLD_IN_FULL:
        assert {miss.reason for miss in told} == {reason}
    else:
        assert any(reason in miss.reason for miss in told), told


@pytest.mark.parametrize(("pattern", "name"), cases("mutations"))
def test_a_mutation_is_computed_as_it_stands(capture: Capture, pattern: Pattern, name: str) -> None:
    ((function, inputs),) = case(pattern, "mutations", name)
    captured = capture(function, inputs)
    gm = captured.canonical()
    rewrite(gm, *ALL)
    captured.check_equal(gm)


@pytest.mark.parametrize("pattern", ALL, ids=lambda pattern: pattern.name)
def test_patterns_read_no_names(capture: Capture, pattern: Pattern) -> None:
    """With every node and parameter renamed the same is found: only the dataflow counts."""
    _, example = next(iter(pattern.examples(DEVICE)), ("", None))
    if example is None:
        pytest.skip("the library in whose ops the examples are spelled is not installed")
    function, inputs = example
    gm = capture(function, inputs).canonical()
    for place, node in enumerate(gm.graph.nodes):
        node.name = f"value_{place}"
        if node.op == "placeholder":
            node.target = f"argument_{place}"
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            node.meta.pop(key, None)
    # Not through `rewrite`: the verifier rightly holds the placeholders to their names.
    patterns = (*foundations(pattern), pattern)
    result = apply_patterns(gm, patterns, MatchContext(prove=Prover().prove))
    used = [done.match.pattern for done in result.rewrites]
    assert used.pop() is pattern
    assert list(dict.fromkeys(used)) == [built for built in foundations(pattern) if built not in UNUSED]
    assert pattern.name in OPS or len(set(used)) == len(used)
