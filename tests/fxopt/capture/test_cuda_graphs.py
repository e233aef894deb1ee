"""When blocks are replayed as CUDA graphs, and what leaves the memory that the next replay writes again.

A stand-in for a replay writes its result and its gradients into the same memory at each call, as CUDA graphs do.
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import fxopt
from fxopt.capture import torch_tensors
from fxopt.capture.cuda_graphs import CudaGraphs, find_obstacle
from fxopt.options import MOST_COPIED


class CompiledFunction(torch.autograd.Function):
    """x * w + b in memory of its own, written again by each call; called as AOTAutograd calls its own."""

    memory: ClassVar[dict[str, torch.Tensor]] = {}

    @staticmethod
    def write(name: str, value: torch.Tensor) -> torch.Tensor:
        buffer = CompiledFunction.memory.setdefault(name, torch.empty_like(value))
        buffer.copy_(value)
        return buffer.detach()  # another tensor on the same memory, as a replay returns

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return CompiledFunction.write("y", x * w + b)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (dy,), (x, w) = gradients, ctx.saved_tensors
        return (
            CompiledFunction.write("dx", dy * w),
            CompiledFunction.write("dw", dy * x),
            CompiledFunction.write("db", dy),
        )


@pytest.fixture
def graphs() -> Any:
    CompiledFunction.memory.clear()
    notes: list[str] = []
    made = CudaGraphs(None, notes.append)
    made.notes = notes  # pyright: ignore[reportAttributeAccessIssue]
    return made


def lower(gm: Any, example_inputs: Any, *, graphed: bool) -> Any:
    assert graphed
    return CompiledFunction.apply


def call(graphs: CudaGraphs, *args: torch.Tensor, times: int = 1) -> torch.Tensor:
    """Run a model of `times` equal blocks."""
    run = graphs.with_replays(lower, "layers")(None, [])  # pyright: ignore[reportArgumentType]
    with graphs.step():
        assert graphs.are_used
        x, *weights = args
        for _ in range(times):
            x = run(x, *weights)
        return graphs.copy_out({"y": x})["y"]


def leaves() -> list[torch.Tensor]:
    return [torch.tensor([value], requires_grad=True) for value in (2.0, 3.0, 5.0)]


def test_gradients_that_accumulate_are_not_in_the_replays_memory(graphs: Any) -> None:
    ours, stock = leaves(), leaves()
    for _ in range(3):
        call(graphs, *ours).sum().backward()
        (stock[0] * stock[1] + stock[2]).sum().backward()
    for own, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(own.grad, expected.grad)


def test_results_that_the_model_returns_are_kept(graphs: Any) -> None:
    first = call(graphs, *leaves())
    expected = first.detach().clone()
    first.sum().backward()
    call(graphs, *(leaf * 7 for leaf in leaves()))
    torch.testing.assert_close(first.detach(), expected)


def test_gradients_between_blocks_are_not_copied(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    original = torch_tensors.copy_each

    def count(copies: list[torch.Tensor], values: list[torch.Tensor]) -> Any:
        counted.append(len(values))
        return original(copies, values)

    monkeypatch.setattr(torch_tensors, "copy_each", count)
    x, w, b = leaves()
    call(graphs, x, w, b, times=2).sum().backward()
    assert counted == [2, 3]  # the second block's input is the first one's result


def test_gradients_pass_views_of_a_blocks_result(graphs: Any) -> None:
    def lower_viewed(gm: Any, example_inputs: Any, *, graphed: bool) -> Any:
        return lambda *args: CompiledFunction.apply(*args).view(1, 1).view(1)

    ours, run = leaves(), graphs.with_replays(lower_viewed, "layers")(None, [])
    for _ in range(2):
        with graphs.step():
            result = run(*ours)
        result.sum().backward()
    assert [float(own.grad) for own in ours] == [6.0, 4.0, 2.0]


def test_gradients_of_what_aotautograd_compiled_are_copied(graphs: Any, monkeypatch: Any) -> None:
    copied: list[torch.Tensor] = []
    monkeypatch.setattr(
        torch_tensors,
        "copy_each",
        lambda to, values: (copied.extend(values), torch._foreach_copy_(to, values)),
    )

    def compiled(gm: Any, example_inputs: Any, *, graphed: bool) -> Any:
        return torch.compile(lambda x, w, b: x * w + b, backend="aot_eager")

    x, w, b = leaves()
    run = graphs.with_replays(compiled, "layers")(None, [])
    with graphs.step():
        y = run(x, w, b)
        z = run(y, w, b)
    z.sum().backward()
    assert [float(each.grad) for each in (x, w, b)] == [9.0, 17.0, 4.0]
    assert sorted(map(float, copied)) == [1.0, 3.0, 6.0, 9.0, 11.0]  # all but the one between the two


def test_a_call_is_not_replayed_before_an_earlier_ones_backward_pass(graphs: Any) -> None:
    first = call(graphs, *leaves())
    other = CudaGraphs(None, graphs.notes.append)
    for model in (graphs, other):  # another model's memory is the same pool
        with model.step():
            assert not model.are_used
    assert len(graphs.notes) == 2
    assert all("waits for its backward pass" in note for note in graphs.notes)
    first.sum().backward(retain_graph=True)
    with graphs.step():
        assert not graphs.are_used
    first.sum().backward()
    with graphs.step():
        assert graphs.are_used


def test_a_dropped_graph_no_longer_waits(graphs: Any) -> None:
    result = call(graphs, *leaves())
    del result
    with graphs.step():
        assert graphs.are_used


def test_a_loss_that_is_kept_does_not_wait(graphs: Any) -> None:
    losses = []
    for _ in range(2):
        loss = call(graphs, *leaves()).sum()
        loss.backward()
        losses.append(loss)


@pytest.mark.parametrize("kept", [torch.autograd.graph.save_on_cpu, None])
def test_blocks_whose_activations_go_to_hooks_are_not_replayed(graphs: Any, kept: Any) -> None:
    with graphs.step(), kept() if kept else contextlib.nullcontext():
        assert graphs.are_used is (kept is None)


def test_blocks_outside_a_model_call_are_not_replayed_and_a_nested_call_is_a_part_of_it(graphs: Any) -> None:
    assert not graphs.are_used
    with graphs.step():
        with graphs.step():
            assert graphs.are_used
        assert graphs.are_used
    assert not graphs.are_used


def test_blocks_that_would_each_keep_a_copy_of_a_wide_mask_are_not_replayed(graphs: Any) -> None:
    x, mask = torch.zeros(2**16), torch.zeros(2**16, dtype=torch.bool)
    most = MOST_COPIED // mask.nbytes
    assert not graphs.serve((x,), {"mask": mask}, 1)
    with graphs.step():
        assert graphs.serve((x,), {"mask": mask, "again": mask}, most)
        assert graphs.serve((x,), {}, 100 * most), "what blocks hand on is copied by none"
        assert graphs.serve((x,), {"mask": mask[:1].expand(2**16, 2**10)}, most), (
            "it takes no more than its memory"
        )
        assert not graphs.notes
        assert not graphs.serve((x,), {"masks": (None, mask)}, most + 1)
    assert graphs.notes == [
        f"CUDA graphs are not used: each of {most + 1} blocks would keep a copy of what all are given, a wide "
        "mask say"
    ]


def test_no_gpu_is_no_news() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert find_obstacle(nn.Linear(2, 2)) == ""


def test_an_unknown_value_is_an_error() -> None:
    with pytest.raises(fxopt.UnknownNameError, match="cuda_graphs: unknown name 'on', expected one of "):
        fxopt.optimize(nn.Linear(2, 2), cuda_graphs="on")
