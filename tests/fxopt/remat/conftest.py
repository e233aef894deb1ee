"""The joint graph of a gated unit and the layers around it, as a planner is shown it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from fxopt.capture.planning import Mark
from fxopt.capture.torch_lowering import trace_joint
from fxopt.kernels.glu import glu
from fxopt.kernels.lora_linear import lora_linear

WIDTH, INNER, RANK, TOKENS = 64, 512, 4, 128


def adapted(x: torch.Tensor, weights: Any, a: Any, b: Any) -> torch.Tensor:
    gate, up = lora_linear(
        x, weights[:2], [None] * 2, [None] * 2, a[:2], b[:2], owners=[0, 1], scales=[0.5, 2.0]
    )
    h = glu(gate, up, act="silu")
    return lora_linear(h, [weights[2]], [None], [None], [a[2]], [b[2]], owners=[0], scales=[0.25])[0]


def dense(x: torch.Tensor, weights: Any, *_: Any) -> torch.Tensor:
    gate, up = (F.linear(x, weight) for weight in weights[:2])
    return F.linear(glu(gate, up, act="silu"), weights[2])


def trace(function: Any) -> tuple[fx.Graph, list[int]]:
    shapes = [(INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER), (RANK, WIDTH), (RANK, WIDTH), (RANK, INNER)]
    shapes += [(INNER, RANK), (INNER, RANK), (WIDTH, RANK)]
    given = [torch.randn(shape) / 8 for shape in shapes]
    trains = [function is dense] * 3 + [function is adapted] * 6
    leaves = [value.requires_grad_(train) for value, train in zip(given, trains, strict=True)]
    graphs: list[fx.Graph] = []

    def show(graph: fx.Graph, held: frozenset[int]) -> str:
        graphs.append(graph)
        return ""

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(function(x.sin(), leaves[:3], leaves[3:6], leaves[6:]))

    torch._dynamo.reset()
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    torch.compile(run, backend=lambda gm, inputs: trace_joint(gm, inputs, Mark(show), decomposed=True))(x)
    (graph,) = graphs
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    held = [n for n, node in enumerate(inputs) if tuple(node.meta["val"].shape) in shapes]
    return graph, held


@pytest.fixture
def trace_unit() -> Callable[[str], tuple[fx.Graph, list[int]]]:
    """Return what traces the unit, "adapted" or "dense", of 128 tokens: the graph, and which inputs are the model's."""
    return lambda name: trace({"adapted": adapted, "dense": dense}[name])
