"""Fails in plain words when a torch version moves something private of AOTAutograd that fxopt touches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fxopt.capture import torch_dynamo, torch_lowering
from fxopt.capture.planning import Mark
from fxopt.demo.training import count_saved_bytes


def test_nodes_run_one_by_one_let_backward_run_twice():
    x = torch.ones(3, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.exp().sin().sum()

    compiled = torch_dynamo.compile_frame(function, torch_lowering.plain_backend, fullgraph=True)
    compiled(x).backward()
    loss = compiled(x)
    loss.backward(retain_graph=True)
    loss.backward()
    assert x.grad is not None
    (once,) = torch.autograd.grad(function(x), x)
    torch.testing.assert_close(x.grad, 3 * once, msg="AOTAutograd's bw_donated_idxs moved")


def test_plain_lowering_saves_no_more_than_stock_and_differentiates():
    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
        return ((torch.sigmoid(x * w) + x.tanh()).sum(),)

    def run(call: Callable[..., tuple[torch.Tensor]]) -> tuple[int, tuple[torch.Tensor, ...]]:
        with count_saved_bytes(torch.nn.ParameterList([x, w])) as saved:  # its parameters are not counted
            (out,) = call(x, w)
        return saved.total, torch.autograd.grad(out, (x, w))

    x, w = (torch.nn.Parameter(torch.randn(64)) for _ in range(2))
    compiled = torch_lowering.plain_backend(torch.fx.symbolic_trace(function), [x, w])
    (our_bytes, ours), (stock_bytes, stock) = run(compiled), run(function)
    assert stock_bytes == 2 * 64 * 4, "stock saves the results of sigmoid and tanh"
    assert our_bytes <= stock_bytes
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


def test_a_joint_graph_is_shown_and_nothing_is_saved():
    shown: list[torch.fx.Graph] = []

    def show(graph: torch.fx.Graph, held: frozenset[int]) -> str:
        shown.append(graph)
        return ""

    w = torch.nn.Parameter(torch.randn(4))

    def trace(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        return torch_lowering.trace_joint(gm, inputs, Mark(show), decomposed=True)

    with count_saved_bytes(torch.nn.ParameterList([w])) as saved:
        out = torch_dynamo.compile_frame(lambda w: (w.sigmoid() * w).sum(), trace, fullgraph=True)(w)
    assert out.requires_grad
    assert saved.total == 0
    (graph,) = shown
    assert len(graph.find_nodes(op="placeholder")) == 2, "a joint graph no longer has primals and tangents"


@pytest.mark.slow  # a C++ compiler runs
def test_inductor_runs_our_passes_over_the_joint_graph(monkeypatch: pytest.MonkeyPatch):
    """Moved if this fails: the setting `joint_custom_pre_pass`, or `CustomGraphPass`."""
    seen: list[torch.fx.Graph] = []
    monkeypatch.setattr(torch_lowering, "compile_kernels", seen.append)
    x = torch.ones(3, requires_grad=True)
    compiled = torch_dynamo.compile_frame(
        lambda x: x.exp().sum(), torch_lowering.inductor_backend, fullgraph=True
    )
    with torch.compiler.config.patch(force_disable_caches=True):  # or no pass runs the second time
        compiled(x).backward()
    assert len(seen) == 1
    assert x.grad is not None
    torch.testing.assert_close(x.grad, x.exp())


def test_passes_are_known_to_caches_by_the_plan_they_carry_out():
    passes = torch_lowering.JointPasses(Mark(lambda graph, held: "a plan"))
    before = passes.uuid()
    graph = torch.fx.symbolic_trace(lambda x: (x,)).graph
    passes(graph)
    assert passes.uuid() != before
    assert torch_lowering.JointPasses().uuid() == before


def test_passes_are_known_to_caches_by_what_autocast_casts_to():
    seen = {torch_lowering.JointPasses().uuid()}
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            seen.add(torch_lowering.JointPasses().uuid())
    assert len(seen) == 3


@pytest.mark.slow  # a C++ compiler runs
def test_what_was_compiled_under_one_autocast_is_not_used_under_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Torch 2.11 alone gives the second of these what it compiled for the first."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, w = torch.randn(8, 8), torch.randn(8, 8, requires_grad=True)
    for dtype in (torch.bfloat16, torch.float16):
        torch.compiler.reset()
        compiled = torch_dynamo.compile_frame(
            lambda x, w: x @ w, torch_lowering.inductor_backend, fullgraph=True
        )
        with torch.autocast("cpu", dtype):
            y = compiled(x, w)
        y.float().sum().backward()  # it is kept once its backward is compiled
        assert y.dtype == dtype


def test_what_is_kept_lies_where_inductor_keeps_what_it_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Moved if this fails: `torch._inductor.runtime.cache_dir_utils.cache_dir`."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    assert torch_lowering.cache_folder() == tmp_path / "kept"
    assert (tmp_path / "kept").is_dir()
