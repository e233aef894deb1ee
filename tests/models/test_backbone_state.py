"""What a model reads before the call of its backbone, and the backbone changes, was read before."""

from __future__ import annotations

import collections
import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt

WIDTH, CLASSES = 32, 64
COUNT = 0
COUNTS = {"calls": 0}


class Kept:
    """An object that a module keeps."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("steps", torch.zeros(()))
        self.writes = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.writes:
            self.steps += 1
        return x + F.gelu(self.linear(x))


class Trunk(nn.Module):
    shared = 0

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.register_buffer("steps", torch.zeros(()))
        self.seen: list[float] = []
        self.recent: collections.deque[float] = collections.deque(maxlen=2)
        self.stats = {"calls": 0}
        self.kept = Kept()
        self.plain = torch.zeros(())
        self.changes = ""

    def forward(self, ids: torch.Tensor) -> Any:
        global COUNT
        x = self.embed(ids)
        if int((ids == 1).sum()) < 0:
            raise ValueError("fewer than none")
        for layer in self.layers:
            x = layer(x)
        match self.changes:
            case "list":
                self.seen.append(1.0)
            case "deque":
                self.recent.append(len(self.recent) + self.stats["calls"] + 1.0)
            case "dict":
                self.stats["calls"] += 1
            case "object":
                self.kept.calls += 1
            case "buffer":
                self.steps += 1
            case "weight":
                with torch.no_grad():
                    self.embed.weight[0] += 1
            case "tensor":
                self.plain += 1
            case "data":
                self.steps.data.add_(1)
            case "replaced":
                for _ in range(2):
                    self.plain = self.plain + 1
            case "class":
                Trunk.shared += 1
            case "class of it":
                type(self).shared += 1
            case "global":
                COUNT += 1
            case "mapping of the file":
                COUNTS["calls"] += 1
        if self.changes == "view":
            return x, x[:, :4]
        return x


class Model(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.trunk, self.head, self.way = Trunk(), nn.Linear(WIDTH, CLASSES, bias=False), way
        self.log: list[float] = []

    def read(self) -> Any:
        """Return what this way of the model reads before the backbone's call."""
        trunk = self.trunk
        match self.way:
            case "list":
                return len(trunk.seen)
            case "deque":
                return sum(trunk.recent)
            case "dict":
                return trunk.stats["calls"]
            case "object":
                return trunk.kept.calls
            case "buffer" | "data":
                return trunk.steps * 1
            case "buffer of a block":
                return trunk.layers[0].steps * 1
            case "weight":
                return trunk.embed.weight[0].mean()
            case "tensor" | "replaced":
                return trunk.plain * 1
            case "class":
                return Trunk.shared
            case "class of it":
                return trunk.shared
            case "global":
                return COUNT
            case "mapping of the file":
                return COUNTS["calls"]
        return 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        factor = 1 + self.read()
        x = self.trunk(ids)
        if isinstance(x, tuple):
            x = torch.cat([x[1] * 2, x[0][:, 4:]], 1)
        if self.way == "log":
            self.log.append(float(len(self.log)))
            factor = factor + self.log[-1]
        logits = self.head(x) * factor
        return F.cross_entropy(logits.view(-1, CLASSES), ids.view(-1))


class Probe:
    """A class whose attribute a captured function reads."""

    number = 1


def guards_classes() -> bool:
    """Return whether a capture is made anew where an attribute of a class has changed: not in torch 2.11."""

    def read(x: torch.Tensor) -> torch.Tensor:
        return x * Probe.number

    compiled: Any = torch.compile(read, backend="eager")
    before = compiled(torch.ones(())).item()
    Probe.number = 2
    return compiled(torch.ones(())).item() == 2 * before


WAYS = [
    "list",
    "deque",
    "dict",
    "object",
    "buffer",
    "buffer of a block",
    "weight",
    "tensor",
    "data",
    "replaced",
    pytest.param(
        "class",
        marks=pytest.mark.skipif(
            not guards_classes(),
            reason="this torch's Dynamo guards nothing that is read of a class by its name",
        ),
    ),
    "class of it",
    "global",
    "mapping of the file",
]


def train(
    model: Model, changing: list[bool], lengths: list[int]
) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Return loss and gradients of one step for each of `changing`: whether the backbone changes something in it."""
    global COUNT
    COUNT, COUNTS["calls"], Trunk.shared = 0, 0, 0
    steps: list[tuple[float, dict[str, torch.Tensor]]] = []
    for changes, length in zip(changing, lengths, strict=True):
        model.trunk.changes = model.way if changes else ""
        model.trunk.layers[0].writes = changes and model.way == "buffer of a block"
        ids = torch.randint(0, CLASSES, (2, length), generator=torch.Generator().manual_seed(length))
        model.zero_grad()
        loss = model(ids)
        loss.backward()
        steps.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))  # type: ignore[misc]
    return steps


def check(tools: Any, way: str, changing: list[bool], lengths: list[int]) -> fxopt.Report:
    torch.manual_seed(0)
    model = Model(way).train()
    stock = copy.deepcopy(model)
    expected = train(stock, changing, lengths)
    fxopt.optimize(model)
    for (loss, gradients), (other, others) in zip(train(model, changing, lengths), expected, strict=True):
        assert abs(loss - other) <= 1e-5 * abs(other)
        assert all(tools.relative(gradients[name], others[name]) < 1e-4 for name in others)
    assert model.trunk.seen == stock.trunk.seen
    assert model.trunk.recent == stock.trunk.recent
    assert (model.trunk.stats, model.log) == (stock.trunk.stats, stock.log)
    assert (model.trunk.steps, model.trunk.plain) == (stock.trunk.steps, stock.trunk.plain)
    return fxopt.explain(model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "changing", [[True, True, True], [False, False, True, False]], ids=["always", "later"]
)
def test_what_the_backbone_changes_was_read_before(way: str, changing: list[bool], tools: Any) -> None:
    assert check(tools, way, changing, [12] * len(changing)).fallbacks == ()


def test_a_list_that_the_model_itself_changes_behind_it(tools: Any) -> None:
    assert check(tools, "log", [False] * 3, [12] * 3).fallbacks == ()


def test_views_of_changing_lengths_beside_what_they_are_views_of(tools: Any) -> None:
    assert check(tools, "view", [True] * 4, [12, 9, 8, 12]).fallbacks == ()
