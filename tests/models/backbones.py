"""A model whose backbone looks at values, as one with images does, its batches, and the comparison with stock."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, CLASSES = 32, 64


@dataclasses.dataclass
class Output:
    """What the model returns."""

    loss: torch.Tensor
    logits: torch.Tensor


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.gain


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = Norm(), nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48)
        self.down = nn.Linear(48, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@dataclasses.dataclass
class Found:
    """What no capture takes apart."""

    last: torch.Tensor


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm = Norm()
        self.returned = "tensor"
        self.count = self.seen = self.counts = 0

    def forward(self, ids: torch.Tensor, images: torch.Tensor | None = None, added: Any = None) -> Any:
        x = self.embed(ids)
        self.seen += self.counts
        if isinstance(added, list):
            added.append(x.mean())
        elif added is not None:
            added += 1
        if images is not None:
            if int((ids == 1).sum()) != images.shape[0]:
                raise ValueError("as many images as places")
            x = x.masked_scatter((ids == 1)[..., None], images)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        self.count += self.returned == "counted"
        return {"tensor": x, "tuple": (x, (ids, None)), "own": Found(x), "counted": (x, self.count)}[
            self.returned
        ]


class Model(nn.Module):
    def __init__(self, returned: str = "tensor", before: str = "", again: bool = False) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(), nn.Linear(WIDTH, CLASSES, bias=False)
        self.trunk.returned, self.before, self.again = returned, before, again
        self.count = 0

    def forward(
        self, ids: torch.Tensor, images: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> Output:
        if images is not None and self.before == "random":
            images = F.dropout(images, 0.5)
        if self.before == "state":
            self.count += 1
        x = self.trunk(ids, images)
        if self.again:
            x = x + self.trunk(ids, images)
        x = x[0] if isinstance(x, tuple) else x.last if isinstance(x, Found) else x
        logits = self.head(x)
        loss = F.cross_entropy(logits.view(-1, CLASSES).float(), labels.view(-1))
        return Output(loss=loss, logits=logits)


def make(**options: Any) -> tuple[Model, Model]:
    torch.manual_seed(0)
    model = Model(**options).train()
    return model, copy.deepcopy(model)


def batch_of(length: int = 12, *, images: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(2, CLASSES, (2, length), generator=generator)
    batch = {"ids": ids, "labels": ids.roll(-1, 1)}
    if images:
        ids[:, 3:5] = 1
        batch["images"] = torch.randn(4, WIDTH, generator=generator)
    return batch


def check(tools: Any, model: Any, stock: Any, batch: dict[str, torch.Tensor], most: float = 1e-4) -> None:
    ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
    assert tools.relative(ours.loss, theirs.loss) < 1e-5
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert tools.relative(ours.gradients[name], gradient) < most, name
