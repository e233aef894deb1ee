"""Switches of the gradient mode: what goes, what must stay, and that gradients are those of before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from fxopt.graph.snapshot import snapshot
from fxopt.graph.switches import remove_idle_switches

SWITCH = "_set_grad_enabled"
X = torch.randn(3, 4, requires_grad=True)
PLACES = torch.arange(3)


def detached(x: Tensor, places: Tensor) -> Tensor:
    with torch.no_grad():
        share = x * 2
    return x * share


def of_places(x: Tensor, places: Tensor) -> Tensor:
    with torch.no_grad():
        angles = places.float()[:, None].cos()
    return x * angles


def with_nothing_read(x: Tensor, places: Tensor) -> Tensor:
    with torch.no_grad():
        x * 2  # pyright: ignore[reportUnusedExpression]
    return x.exp()


def within_one_another(x: Tensor, places: Tensor) -> Tensor:
    with torch.no_grad():
        with torch.enable_grad():
            y = x * 2
        with torch.no_grad():
            z = x * 3
    return y * z


def written_inside(x: Tensor, places: Tensor) -> Tensor:
    y = torch.zeros(3)
    with torch.no_grad():
        y.add_(places)
    return x * y[:, None]


CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[bool]]] = {
    "around what needs a gradient they stay": (detached, [False, True]),
    "around what needs none they go": (of_places, []),
    "around nothing they go": (with_nothing_read, []),
    "to the mode that is on they go": (within_one_another, [False, True]),
    "around a write that becomes a value they go": (written_inside, []),
}


def modes_of(gm: fx.GraphModule) -> list[bool]:
    return [bool(node.args[0]) for node in gm.graph.nodes if SWITCH in str(node.target)]


@pytest.mark.parametrize("name", CASES)
def test_switches(name: str, capture, canonical) -> None:
    function, expected = CASES[name]
    captured = capture(function, X, PLACES)
    assert modes_of(captured.gm), "Dynamo writes them"
    gm = canonical(captured)  # to the bit, gradients too
    assert modes_of(gm) == expected, snapshot(gm)


def switches(*modes: bool) -> fx.Graph:
    """Return a graph of switches, each before an op that may return something else without gradients."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = X
    for mode in modes:
        graph.call_function(torch._C._set_grad_enabled, (mode,))
        graph.call_function(torch.neg, (x,))
    return graph


@pytest.mark.parametrize(
    ("modes", "entered_in", "left"),
    [
        ((True, False), True, [False]),  # what the graph leaves the mode at
        ((True, False), None, [True, False]),
        ((False, False, True, True), True, [False, True]),
        ((False, False, True, True), False, [True]),
    ],
)
def test_a_graph_leaves_the_mode_as_before(
    modes: tuple[bool, ...], entered_in: bool | None, left: list[bool]
) -> None:
    graph = switches(*modes)
    remove_idle_switches(graph, entered_in)
    assert [bool(node.args[0]) for node in graph.nodes if SWITCH in str(node.target)] == left


def test_a_graph_entered_without_gradients_is_left_so(capture, canonical) -> None:
    with torch.no_grad():
        gm = canonical(capture(detached, X, PLACES))
    assert modes_of(gm) == []
