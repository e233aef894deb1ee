"""What the loss patterns make of each spelling: the attributes of the op, and nothing left of the stock nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt.patterns import ALL
from fxopt.rewriting.proof import Prover
from fxopt.rewriting.rewrite import MatchContext, apply_patterns

CPU = torch.device("cpu")
Z_LOSS = {"z_loss": 0.01, "z_rows": "all"}
EXPECTED: dict[str, dict[str, dict[str, Any]]] = {
    "linear_cross_entropy": {
        "sum over a number bf16": {"reduction": "sum", "denominator": 7},
        "sum bf16": {"reduction": "sum", "denominator": None},
        "smoothed bf16": {"label_smoothing": 0.1, "reduction": "mean"},
        "flattened first bf16": {"scale": 0.5, "softcap": 30.0},
        "divided bf16": {"scale": 0.125, "softcap": 0.0},
        "z-loss bf16": {**Z_LOSS, "reduction": "mean"},
        "z-loss of a capped head bf16": {**Z_LOSS, "softcap": 30.0, "reduction": "sum"},
        "z-loss of labelled rows bf16": {"z_loss": 1e-3, "z_rows": "labelled"},
    },
    "cross_entropy": {
        "sum over a number bf16": {"reduction": "sum", "denominator": 7},
        "flattened first bf16": {"softcap": 5.0},
        "log softmax bf16": {"label_smoothing": 0.0, "reduction": "mean"},
        "z-loss bf16": {**Z_LOSS, "reduction": "mean"},
        "z-loss in a sum over a number bf16": {"z_loss": 0.01, "z_rows": "labelled", "denominator": 7},
    },
}
CASES = [
    pytest.param(pattern, name, id=f"{pattern}-{name.replace(' ', '_')}")
    for pattern, names in EXPECTED.items()
    for name in names
]
LAYOUT = {"reshape", "cast", "getitem", "contiguous", "pad"}


@pytest.mark.parametrize(("pattern", "name"), CASES)
def test_a_spelling_becomes_attributes(pattern: str, name: str, capture: Any) -> None:
    (examples,) = (each.examples for each in ALL if each.name == pattern)
    function, inputs = dict(examples(CPU))[name]
    gm = capture(function, inputs).canonical()
    apply_patterns(gm, ALL, MatchContext(prove=Prover().prove))
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    (op,) = (node for node in calls if node.target.__name__ == pattern)
    expected = EXPECTED[pattern][name]
    assert {key: op.kwargs[key] for key in expected} == pytest.approx(expected)
    assert {node.target.__name__ for node in calls} - LAYOUT == {pattern}


def test_a_mean_divided_once_more_leaves_the_division(capture: Any) -> None:
    """As one step of gradient accumulation writes it."""
    inputs = torch.randn(6, 9, requires_grad=True), torch.randint(0, 9, (6,))
    gm = capture(lambda z, t: F.cross_entropy(z, t) / 4, inputs).canonical()
    apply_patterns(gm, ALL, MatchContext(prove=Prover().prove))
    names = [node.target.__name__ for node in gm.graph.nodes if node.op == "call_function"]
    assert names == ["cross_entropy", "div"]
