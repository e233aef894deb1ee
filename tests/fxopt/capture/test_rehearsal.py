"""Kernels compiled ahead from a joint graph: each op of ours runs once, on memory of its own, with no launch."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt.capture import joint_passes, rehearsal, torch_lowering
from fxopt.kernels.glu import glu
from fxopt.kernels.launcher import is_rehearsal, rehearsed


@contextlib.contextmanager
def ahead(device: torch.device) -> Any:
    """What a GPU has: launches are left out, here of ops that launch nothing."""
    assert device.type == "cpu"
    with rehearsed():
        yield True


def no_gpu_state(devices: list[int]) -> Any:
    """What keeps the random state of GPUs, where there is none."""
    assert devices == [0]
    return contextlib.nullcontext()


@pytest.fixture
def joint_graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of ops that were run for each joint graph."""
    found: list[int] = []
    prepare = joint_passes.prepare_joint

    def prepare_and_rehearse(graph: torch.fx.Graph, *args: Any) -> str:
        plan = prepare(graph, *args)
        found.append(rehearsal.compile_kernels(graph))
        return plan

    monkeypatch.setattr(joint_passes, "prepare_joint", prepare_and_rehearse)
    return found


def run(length: int) -> None:
    """Run forward and backward of a gated product, lowered node by node."""
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    product = graph.call_function(F.linear, (x, w))
    graph.output((graph.call_function(glu, (product, x), {"act": "silu"}),))
    inputs = [torch.randn(2, length, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)]
    lowered = torch_lowering.plain_backend(torch.fx.GraphModule(torch.nn.Module(), graph), inputs)
    lowered(*inputs)[0].sum().backward()
    assert inputs[0].grad is not None


def test_nothing_runs_without_a_gpu(joint_graphs: list[int]) -> None:
    run(5)
    assert joint_graphs == [0]


def test_forward_and_backward_ops_run_once(joint_graphs, monkeypatch) -> None:
    monkeypatch.setattr(rehearsal, "compiled_ahead", ahead)
    monkeypatch.setattr(torch.random, "fork_rng", no_gpu_state)
    run(5)
    assert joint_graphs == [2]
    assert not is_rehearsal()


def test_an_op_that_fails_is_left_to_the_first_call(joint_graphs, monkeypatch, caplog) -> None:
    @contextlib.contextmanager
    def full(device: torch.device) -> Any:
        raise torch.OutOfMemoryError("no memory")
        yield

    monkeypatch.setattr(rehearsal, "compiled_ahead", full)
    monkeypatch.setattr(torch.random, "fork_rng", no_gpu_state)
    with caplog.at_level(logging.DEBUG, "fxopt"):
        run(6)
    assert joint_graphs == [0]
    assert "was not compiled ahead: OutOfMemoryError: no memory" in caplog.text


def test_ops_with_large_inputs_are_left_out(joint_graphs, monkeypatch) -> None:
    monkeypatch.setattr(rehearsal, "compiled_ahead", ahead)
    monkeypatch.setattr(torch.random, "fork_rng", no_gpu_state)
    monkeypatch.setattr(
        rehearsal, "MOST_BYTES", 2 * 2 * 7 * 8 * 4
    )  # two inputs of forward, three of backward
    run(7)
    assert joint_graphs == [1]
