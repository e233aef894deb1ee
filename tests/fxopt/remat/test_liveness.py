"""What lives at each instant of a region: ops that may run in place need no memory beside what they write over."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from fxopt.capture.planning import Mark
from fxopt.capture.torch_lowering import trace_joint
from fxopt.kernels.glu import glu
from fxopt.kernels.launch import DECLARED
from fxopt.kernels.lora_linear import lora_linear
from fxopt.remat.devices import DEVICES
from fxopt.remat.joint import Joint, read_joint
from fxopt.remat.liveness import simulate
from fxopt.remat.menu import find_menu

WIDTH, INNER, RANK, TOKENS = 64, 512, 4, 128
WIDE = 4 * TOKENS * INNER
"""The bytes of gate, of up, and of the gradient of each."""


def adapted(x: torch.Tensor, weights: Any, a: Any, b: Any) -> torch.Tensor:
    gate, up = lora_linear(
        x, weights[:2], [None] * 2, [None] * 2, a[:2], b[:2], owners=[0, 1], scales=[0.5, 2.0]
    )
    h = glu(gate, up, act="silu")
    return lora_linear(h, [weights[2]], [None], [None], [a[2]], [b[2]], owners=[0], scales=[0.25])[0]


def dense(x: torch.Tensor, weights: Any, *_: Any) -> torch.Tensor:
    gate, up = (F.linear(x, weight) for weight in weights[:2])
    return F.linear(glu(gate, up, act="silu"), weights[2])


def read(function: Any, *, fuses: bool = True) -> Joint:
    """Return the joint graph of `function` as the planner reads it: adapters train, or all of a dense one."""
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
    return read_joint(graph, held, DEVICES[0], fuses=fuses, declared=DECLARED)


def spared_by(joint: Joint) -> list[int]:
    """Return the bytes of backward that each choice of the menu is spared by what runs in place, the fastest first."""
    apart = dataclasses.replace(joint, overwriting={})
    return [
        simulate(apart, choice).backward - simulate(joint, choice).backward for choice in find_menu(joint.dag)
    ]


@pytest.mark.parametrize(("function", "at_most"), [(adapted, 2), (dense, 3)])
def test_what_is_computed_again_is_written_over_and_what_is_saved_is_not(function: Any, at_most: int) -> None:
    spared = spared_by(read(function))
    assert spared[0] == WIDE  # gate and up are saved: over the gradient of the unit
    assert WIDE < spared[-1] <= at_most * WIDE


def test_where_nodes_run_one_by_one_nothing_is_written_over() -> None:
    assert not any(spared_by(read(adapted, fuses=False)))
