"""What happens where a capture fails: mistakes are raised, the rest runs stock once, with its reason."""

from __future__ import annotations

import copy
import inspect
import random
import re

import pytest
import torch
from torch import nn

import fxopt
from fxopt.capture import torch_lowering
from fxopt.capture.installation import Installation
from fxopt.errors import FxoptError, VerifyError
from fxopt.graph.sizes import span_of
from fxopt.report.records import MODEL_REGION

IDS = torch.arange(1, 17).reshape(2, 8)


class Broken(nn.Module):
    """A block that Dynamo cannot capture."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x * 2


class Stack(nn.Module):
    """Three blocks and a head."""

    def __init__(self, *blocks: nn.Module, name: str = "layers") -> None:
        super().__init__()
        self.table = nn.Embedding(32, 8)
        self.name = name
        setattr(self, name, nn.ModuleList(nn.Sequential(nn.Linear(8, 8), block) for block in blocks))
        self.head = nn.Linear(8, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in getattr(self, self.name):
            x = layer(x)
        return self.head(x).square().mean()


@pytest.mark.parametrize("error", [VerifyError("rewrite: the graph is broken"), FxoptError("mine: is wrong")])
def test_a_broken_pass_raises_and_is_no_fallback(error: Exception) -> None:
    model = Stack(*(nn.Tanh() for _ in range(3))).train()

    def transform(gm, *, region, lazy_outputs):
        raise error

    installation = Installation(model, None, transform, torch_lowering.plain_backend, partial=False)
    installation.install()
    with pytest.raises(type(error), match=str(error)):
        model(IDS)
    assert installation.ledger.fallback_records() == ()


@pytest.mark.slow
def test_a_cache_that_evaluation_builds_is_told_in_plain_words(build, install) -> None:
    model = build().eval()
    installation = install(model)
    model(IDS).logits.sum().backward()
    records = {record.region: record.reason for record in installation.ledger.fallback_records()}
    assert MODEL_REGION not in records, "the head is captured behind the backbone"
    told = "a block is given an object that no graph can hold, as a key/value cache is"
    assert any("captured behind its" in note and told in note for note in installation.ledger.notes)
    assert "past_key_values is a DynamicCache" in records["model.layers"]
    model(IDS, use_cache=False).logits.sum().backward()
    assert MODEL_REGION in installation.ledger.served


def test_another_error_of_a_pass_is_told_by_its_type_and_text() -> None:
    model = Stack(*(nn.Tanh() for _ in range(3))).train()

    def transform(gm, *, region, lazy_outputs):
        raise ZeroDivisionError("by nothing")

    installation = Installation(model, None, transform, torch_lowering.plain_backend, partial=False)
    installation.install()
    model(IDS).backward()
    reasons = [fallback.reason for fallback in installation.ledger.fallback_records()]
    assert reasons
    assert all("ZeroDivisionError: by nothing" in reason for reason in reasons)


def test_a_mistake_of_fxopts_own_names_its_line_there() -> None:
    model = Stack(*(nn.Tanh() for _ in range(3))).train()

    def transform(gm, *, region, lazy_outputs):
        span_of(None)  # type: ignore[arg-type]

    installation = Installation(model, None, transform, torch_lowering.plain_backend, partial=False)
    installation.install()
    model(IDS).backward()
    (reason,) = {f.reason for f in installation.ledger.fallback_records() if f.region != MODEL_REGION}
    assert re.match(
        r"capture failed: fxopt itself failed, at fxopt/graph/sizes\.py:\d+: AttributeError: .* 'shape'$",
        reason,
    )


def test_hooks_fire_once_where_a_capture_fails() -> None:
    model = Stack(*(Broken() for _ in range(3))).train()
    fxopt.optimize(model)
    calls: list[str] = []
    model.layers[1].register_forward_pre_hook(lambda module, args: calls.append("block"))
    model.register_forward_pre_hook(lambda module, args: calls.append("model"))
    model(IDS).backward()
    assert sorted(calls) == ["block", "model"]
    assert fxopt.explain(model).fallbacks


def test_a_trunk_whose_blocks_change_their_form_runs_once(install) -> None:
    """A block that returns another dtype than at capture: the stock forward goes on, nothing runs twice."""

    class Counting(nn.Module):
        wide = False
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.double() if self.wide else x * 1

    blocks = [Counting() for _ in range(3)]
    model = Stack(*blocks).train()
    installation = install(model)
    model(IDS).backward()
    seen: list[int] = []
    model.table.register_forward_hook(lambda module, args, out: seen.append(1))
    blocks[-1].wide = True
    model.head.double()
    model(IDS).backward()
    assert seen == [1]
    assert installation.ledger.fallback_records() != ()


class Listing(nn.Module):
    """A layer that lists as many numbers as its input says, as window indices of images are made."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = x.detach().abs().sum().long() + 2
        rows = torch.arange(count.item()).reshape(-1, 1).repeat_interleave(count, dim=0)
        return x * (1 + len(rows.flatten().tolist()) % 3)


@pytest.mark.parametrize("place", [pytest.param("in a block", marks=pytest.mark.slow), "before the blocks"])
def test_sizes_that_hang_on_values_break_a_block_and_keep_a_tail_stock(place: str) -> None:
    torch.manual_seed(0)
    model = Stack(*(Listing() if place == "in a block" else nn.Tanh() for _ in range(3))).train()
    if place == "before the blocks":
        model.table = nn.Sequential(model.table, Listing())
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    for each in (model, stock):
        each(IDS).backward()
    for mine, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    report = fxopt.explain(model)
    if place == "in a block":
        assert report.regions[0].breaks
        assert report.fallbacks == ()
    else:
        assert report.fallbacks
        assert all(fallback.reason for fallback in report.fallbacks)


class Unseen(torch.nn.Linear):
    """A block that Dynamo is told to leave alone."""

    @torch._dynamo.disable
    def forward(self, input):
        return super().forward(input).tanh()


def test_blocks_of_which_no_piece_is_captured_are_counted() -> None:
    model = torch.nn.Sequential(*(Unseen(4, 4) for _ in range(3)))
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    x = torch.randn(2, 4)
    assert torch.equal(model(x), stock(x))
    report = fxopt.explain(model)
    ((reason, count),) = [
        (fallback.reason, fallback.count) for fallback in report.fallbacks if fallback.region != MODEL_REGION
    ]
    assert count == 3
    assert reason.startswith("its graph breaks before a piece of it could be captured; Skip inlining ")
    assert re.search(r"; at test_refusals\.py:\d+$", reason)
    assert " at 0x" not in reason
    assert (report.regions[0].status, report.regions[0].reason) == ("stock", reason)
    assert report.regions[0].unseen == 3
    assert "not captured, their sites are in no count: 3 of 3 blocks at 0\n" in str(report)


class Dropping(nn.Linear):
    """A block that is left out by chance."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if random.random() < 0:
            return input
        return super().forward(input).tanh()


def test_blocks_that_break_at_their_first_op_say_why_and_where() -> None:
    model = fxopt.optimize(nn.Sequential(*(Dropping(4, 4) for _ in range(3))))
    model(torch.randn(2, 4)).sum().backward()
    blocks = fxopt.explain(model).regions[0]
    line = inspect.getsourcelines(Dropping.forward)[1] + 1
    assert (blocks.status, blocks.unseen) == ("captured", 0)
    (reason,) = blocks.breaks
    assert "Random.random" in reason
    assert reason.endswith(f"; at test_refusals.py:{line}")


class Named(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": x.tanh()}


class Looping(nn.Module):
    """Blocks that are left out by chance, or that return a dict."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.kind = nn.Linear(8, 8), kind
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), Named() if kind == "dict" else nn.Tanh()) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            if self.kind == "random" and random.random() < 0:
                continue
            if self.kind == "rand" and torch.rand(1).item() < -1:
                continue
            found = layer(x)
            x = found["x"] if self.kind == "dict" else found
        return x.square().mean()


@pytest.mark.parametrize(
    ("kind", "text", "cause"),
    [
        ("random", "random.random()", "Random.random"),
        ("rand", "torch.rand(1)", "what is computed depends on the values of a tensor; "),
        ("dict", "found = layer", "a block returns something else than a tensor or a tuple of tensors; "),
    ],
)
def test_a_tail_that_is_not_captured_is_told_in_the_headline_with_its_cause_and_line(
    kind: str, text: str, cause: str
) -> None:
    model = fxopt.optimize(Looping(kind).train())
    model(torch.randn(2, 8)).backward()
    report = fxopt.explain(model)
    tail = report.regions[-1]
    lines, first = inspect.getsourcelines(Looping.forward)
    (line,) = (first + number for number, each in enumerate(lines) if text in each)
    assert (tail.status, tail.unseen, report.regions[0].unseen) == ("stock", 1, 0)
    assert cause in tail.reason
    assert tail.reason.endswith(f"; at test_refusals.py:{line}")
    assert "\nnot captured, their sites are in no count: the tail\n" in str(report)


def test_a_reason_of_several_lines_is_told_to_the_end_of_its_sentence() -> None:
    model = Stack(*(nn.Tanh() for _ in range(3))).train()

    def transform(gm, *, region, lazy_outputs):
        raise RuntimeError("a view was made without grad\nand is written to in place.\nWhile executing %x")

    installation = Installation(model, None, transform, torch_lowering.plain_backend, partial=False)
    installation.install()
    model(IDS).backward()
    told = "RuntimeError: a view was made without grad and is written to in place"
    reasons = [fallback.reason for fallback in installation.ledger.fallback_records()]
    assert reasons
    assert all(told in reason and "While executing" not in reason for reason in reasons)


def test_blocks_may_be_called_as_what_stands_around_them() -> None:
    """The graphs of blocks in a list called "model" are told from the graph of the model."""
    told = []
    for name in ("model", "layers"):
        model = fxopt.optimize(Stack(*(nn.Tanh() for _ in range(3)), name=name))
        model(IDS).backward()
        report = fxopt.explain(model)
        told.append([(region.kind, region.count, region.captures) for region in report.regions])
        assert [(graph.region, graph.layers) for graph in report.graphs] == [(name, 3), (MODEL_REGION, 1)]
        assert "def tail(" not in report.graphs[0].code
    assert told[0] == told[1] == [("block", 3, 1), ("model", 1, 1)]
