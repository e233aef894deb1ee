"""Blocks that look at values: captured in pieces, their results stood in for by what random values give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxopt
from fxopt.capture import torch_dynamo, torch_lowering
from fxopt.capture.installation import Installation
from fxopt.errors import FxoptError


class Experts(nn.Module):
    """A residual layer of experts in a loop over those that were hit; `calls` counts as a buffer does."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.RMSNorm(8), nn.Linear(8, 4)
        self.experts = nn.ParameterList(nn.Parameter(torch.randn(8, 8) * 0.3) for _ in range(4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        normed = self.norm(x)
        weights = self.router(normed).softmax(-1)
        chosen = weights.argmax(-1)
        out = torch.zeros_like(x)
        for hit in torch.bincount(chosen.flatten(), minlength=4).nonzero():
            expert = int(hit.item())
            rows = torch.where(chosen == expert)
            out[rows] += F.silu(normed[rows] @ self.experts[expert]) * weights[rows][:, expert, None]
        return x + out


class Shortened(nn.Module):
    """A layer that keeps the tokens its values choose."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = (x.sum((0, 2)) > x.sum((0, 2)).median()).nonzero().flatten()
        return self.linear(x[:, kept[: 1 + int(x.sum().abs().item()) % 3]])


class Net(nn.Module):
    """Three layers and a head."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(3))
        self.norm, self.head = nn.RMSNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)).pow(2).mean()


def assert_trained_alike(model: nn.Module, stock: nn.Module, x: torch.Tensor) -> None:
    for each in (model, stock):
        each.zero_grad()
        torch.manual_seed(3)
        each(x).backward()
    assert torch.equal(torch.rand(1), (torch.manual_seed(3), torch.rand(1))[1])
    for (name, mine), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)
    for mine, theirs in zip(model.buffers(), stock.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_loop_over_experts_is_captured_in_pieces_and_so_is_what_follows_the_blocks() -> None:
    torch.manual_seed(0)
    model = Net(Experts).train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    for tokens in (5, 5, 7, 9):  # the later ones are captured with symbolic sizes
        assert_trained_alike(model, stock, torch.randn(2, tokens, 8))
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert [region.status for region in report.regions] == ["captured", "captured"]
    (broken,) = report.regions[0].breaks
    assert "test_pieces.py:" in broken
    assert [(site.pattern, site.status, site.count) for site in report.sites] == [
        ("rms_norm", "rewritten", 3),
        ("rms_norm", "rewritten", 1),
    ]


class Unseen(nn.Linear):
    """A layer that Dynamo is told to leave alone."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    @torch._dynamo.disable
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).tanh()


@pytest.mark.slow
def test_breaks_are_told_where_other_blocks_of_the_region_stay_stock() -> None:
    model = Net(Experts)
    model.layers[2] = Unseen()
    fxopt.optimize(model.train())
    model(torch.randn(2, 5, 8)).backward()
    blocks = fxopt.explain(model).regions[0]
    assert blocks.status == "stock"
    assert any("test_pieces.py:" in broken for broken in blocks.breaks)


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).pow(2)


def test_a_call_that_fails_in_stock_too_is_no_break() -> None:
    model = fxopt.optimize(Net(Squared).train())
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 7))
    model(torch.randn(2, 5, 8)).backward()
    blocks = fxopt.explain(model).regions[0]
    assert (blocks.status, blocks.breaks) == ("captured", ())


def test_random_states_are_left_alone_by_the_first_step() -> None:
    model = fxopt.optimize(Net(Experts).train())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))).backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_with_partial_off_such_a_block_stays_stock() -> None:
    model = fxopt.optimize(Net(Experts).train(), partial=False)
    model(torch.randn(2, 5, 8)).backward()
    report = fxopt.explain(model)
    assert report.regions[0].status == "stock"
    assert "test_pieces.py:" in report.regions[0].reason


@pytest.mark.parametrize("scale", [1.0, pytest.param(3.0, marks=pytest.mark.slow)])
def test_a_block_whose_results_sizes_hang_on_values_keeps_the_tail_stock(scale: float) -> None:
    torch.manual_seed(0)
    model = Net(Shortened).train()
    model.layers = model.layers[:2]
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    assert_trained_alike(model, stock, torch.randn(2, 9, 8) * scale)
    tail = fxopt.explain(model).regions[-1]
    assert tail.status == "stock"
    assert "test_pieces.py:" in tail.reason


def test_a_number_read_before_the_blocks_and_used_after_them_is_read_at_each_call() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            count = (x > 0).sum().item()
            least = torch.tensor(0.5)
            for layer in self.layers:
                x = layer(x)
            return self.head(x).pow(2).sum() / torch.maximum(least, self.head.bias.abs().sum()) / count

    torch.manual_seed(0)
    model = Counting().train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    for shift in (0.0, 1.0, -1.0):
        assert_trained_alike(model, stock, torch.randn(2, 5, 8) + shift)
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert [region.status for region in report.regions] == ["captured", "captured"]


class Branching(nn.Module):
    """A layer that looks at a value, and loops over nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > -1e9 else x


@pytest.mark.slow
def test_a_layer_without_a_loop_is_not_captured_with_loops_again(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []
    compile_frame = torch_dynamo.compile_frame

    def spy(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        entered.append(function.__name__)
        return compile_frame(function, *args, **kwargs)

    monkeypatch.setattr(torch_dynamo, "compile_frame", spy)
    for kind in (Branching, Experts):
        torch.manual_seed(0)
        stock = Net(kind)
        model = fxopt.optimize(copy.deepcopy(stock))
        assert_trained_alike(model, stock, torch.randn(2, 5, 8))
        assert ("turns_entry" in entered) == (kind is Experts)


class Counted(nn.Module):
    """A layer that counts its calls, and whose graph breaks before its tanh."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        x = self.linear(x)
        torch._dynamo.graph_break()
        return x.tanh()


def install_failing(model: nn.Module, error: Exception) -> Installation:
    """Install capture in `model` so that `error` is raised for each graph with a tanh."""

    def transform(gm: fx.GraphModule, *, region: str, lazy_outputs: bool) -> None:
        if any(node.target == "tanh" for node in gm.graph.nodes):
            raise error

    installation = Installation(model, None, transform, torch_lowering.plain_backend, partial=True)
    installation.install()
    return installation


def test_a_piece_that_cannot_be_compiled_runs_as_captured_and_what_ran_before_it_does_not_run_again() -> None:
    torch.manual_seed(0)
    model = Net(Counted).train()
    stock = copy.deepcopy(model)
    installation = install_failing(model, AssertionError("planted"))
    for _ in range(2):
        assert_trained_alike(model, stock, torch.randn(2, 5, 8))
    told = {(record.region, record.reason): record.count for record in installation.ledger.fallback_records()}
    assert told == {("layers", "a piece runs as stock: AssertionError: planted"): 6}
    assert "layers" not in installation.ledger.refused


def test_a_mistake_of_the_users_in_a_piece_is_raised() -> None:
    model = Net(Counted).train()
    install_failing(model, FxoptError("planted"))
    with pytest.raises(FxoptError, match="planted"):
        model(torch.randn(2, 5, 8))


class BrokenLinear(nn.Linear):
    """A linear layer whose graph breaks before it begins."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(input).tanh()


class Doubling(nn.Module):
    """A layer with twice its weight while it runs; asked for its modules it puts the weight back."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = BrokenLinear(8, 8)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        self.put_back()
        return super().named_modules(*args, **kwargs)

    def put_back(self) -> None:
        if "kept" in self.__dict__:
            del self.linear.weight
            self.linear.register_parameter("weight", self.__dict__.pop("kept"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.__dict__["kept"] = self.linear.weight
        del self.linear.weight
        self.linear.weight = weight * 2
        x = self.linear(x)
        self.put_back()
        return x


def test_a_block_is_not_asked_for_its_modules_while_its_pieces_are_captured() -> None:
    torch.manual_seed(0)
    model = Net(Doubling).train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    for _ in range(2):
        assert_trained_alike(model, stock, torch.randn(2, 5, 8))
