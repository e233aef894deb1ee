"""Every pattern on its own examples, near misses and mutations, against the stock graph it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from fxopt.graph.verify import verify
from fxopt.patterns import ALL
from fxopt.rewriting.near_miss import find_nearest_miss
from fxopt.rewriting.pattern import Pattern
from fxopt.rewriting.proof import Prover
from fxopt.rewriting.rewrite import MatchContext, RewriteResult, apply_patterns

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Capture = Callable[..., Any]


def cases(kind: str) -> list[Any]:
    """Return one parameter per case; the case itself is built in the test, from its name."""
    found: list[Any] = []
    for pattern in ALL:
        for name, *_ in getattr(pattern, kind)(torch.device("cpu")):
            found.append(pytest.param(pattern, name, id=f"{pattern.name}-{name.replace(' ', '_')}"))
    return found


def case(pattern: Pattern, kind: str, wanted: str) -> Any:
    return next(rest for name, *rest in getattr(pattern, kind)(DEVICE) if name == wanted)


def rewrite(gm: fx.GraphModule, *patterns: Pattern) -> RewriteResult:
    result = apply_patterns(gm, patterns, MatchContext(lazy_outputs=False, prove=Prover().prove))
    verify(gm, "rewrite")
    return result


@pytest.mark.parametrize(("pattern", "name"), cases("examples"))
def test_an_example_is_rewritten_once_and_equals_stock(capture: Capture, pattern: Pattern, name: str) -> None:
    ((function, inputs),) = case(pattern, "examples", name)
    captured = capture(function, inputs)
    gm = captured.canonical()
    num_before = len(gm.graph.nodes)

    result = rewrite(gm, pattern)

    assert [refusal.reason for refusal in result.refused] == []
    (done,) = result.rewrites
    assert len(gm.graph.nodes) == num_before - len(done.before) + len(done.after)
    new = [node for node in gm.graph.nodes if node.meta.get("rewritten_by") == pattern.name]
    assert [node.name for node in new] == list(done.after)
    assert all(done.origins == node.meta["origins"] for node in new)
    assert done.record.op == pattern.name
    assert done.proof is not None
    assert done.proof.passed
    captured.check_equal(gm)
    again = rewrite(gm, pattern)
    assert (again.rewrites, again.refused) == ([], [])


@pytest.mark.parametrize(("pattern", "name"), cases("examples"))
def test_all_patterns_together_take_an_example_once(capture: Capture, pattern: Pattern, name: str) -> None:
    ((function, inputs),) = case(pattern, "examples", name)
    gm = capture(function, inputs).canonical()
    assert [done.match.pattern.name for done in rewrite(gm, *ALL).rewrites] == [pattern.name]


@pytest.mark.parametrize(("pattern", "name"), cases("near_misses"))
def test_a_near_miss_is_left_alone_with_its_reason(capture: Capture, pattern: Pattern, name: str) -> None:
    (function, inputs), reason = case(pattern, "near_misses", name)
    captured = capture(function, inputs)
    gm = captured.canonical()
    assert rewrite(gm, pattern).rewrites == []
    misses = [
        find_nearest_miss(gm, (pattern,), node.name, lazy_outputs=False)
        for node in captured.stock.graph.nodes
    ]
    assert all(not miss and isinstance(miss.reason, str) for miss in misses)
    assert reason in " | ".join(miss.reason for miss in misses)


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
    _, (function, inputs) = next(iter(pattern.examples(DEVICE)))
    gm = capture(function, inputs).canonical()
    for place, node in enumerate(gm.graph.nodes):
        node.name = f"value_{place}"
        if node.op == "placeholder":
            node.target = f"argument_{place}"
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            node.meta.pop(key, None)
    # Not through `rewrite`: the verifier rightly holds the placeholders to their names.
    result = apply_patterns(gm, (pattern,), MatchContext(prove=Prover().prove))
    assert [done.record.op for done in result.rewrites] == [pattern.name]
