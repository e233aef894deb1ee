"""A language model of one level: its layers hang on the class with the loss, and nothing is spelled as usual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class HeronConfig(PretrainedConfig):
    """Sizes under names of its own."""

    model_type = "heron"

    def __init__(self, breadth: int = 64, floors: int = 3, beaks: int = 4, words: int = 256, **rest) -> None:
        self.breadth, self.floors, self.beaks, self.words = breadth, floors, beaks, words
        super().__init__(**rest)


def level(values: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """A root-mean-square norm, divided by a square root, with a gain about zero."""
    wide = values.to(torch.float)
    energy = torch.mean(torch.square(wide), dim=-1, keepdim=True)
    return (torch.div(wide, torch.sqrt(energy + 1e-5)) * (1.0 + gain.float())).to(values.dtype)


def spin(values: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs as complex numbers."""
    pairs = torch.view_as_complex(values.float().reshape(*values.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(values)


class Floor(nn.Module):
    """Attention written out, then a gated unit from one packed projection, each between two norms."""

    def __init__(self, config: HeronConfig) -> None:
        super().__init__()
        width = config.breadth
        self.beaks = config.beaks
        self.gains = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(4))
        self.ask, self.offer, self.carry, self.gather = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.widen = nn.Linear(width, 4 * width, bias=False)
        self.shrink = nn.Linear(2 * width, width, bias=False)

    def forward(self, stream: torch.Tensor, turns: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        g0, g1, g2, g3 = self.gains
        rows, length, width = stream.shape
        seen = level(stream, g0)
        q, k, v = (
            part(seen).view(rows, length, self.beaks, -1) for part in (self.ask, self.offer, self.carry)
        )
        q, k, v = spin(q, turns).transpose(1, 2), spin(k, turns).transpose(1, 2), v.transpose(1, 2)
        scores = torch.matmul(q, k.transpose(2, 3)) / (width // self.beaks) ** 0.5
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        mixed = torch.softmax(scores, dim=-1) @ v
        mixed = self.gather(mixed.transpose(1, 2).reshape(rows, length, width))
        stream = stream + level(mixed, g1)
        up, gate = self.widen(level(stream, g2)).chunk(2, dim=-1)
        return stream + level(self.shrink(up * (gate * torch.sigmoid(gate))), g3)


class HeronForWriting(PreTrainedModel):
    """Words in, loss and scores out."""

    config_class = HeronConfig

    def __init__(self, config: HeronConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.words, config.breadth)
        self.tower = nn.ModuleList(Floor(config) for _ in range(config.floors))
        self.last_gain = nn.Parameter(torch.zeros(config.breadth))
        self.speak = nn.Linear(config.breadth, config.words, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **_) -> dict:
        length, size = input_ids.shape[1], self.config.breadth // self.config.beaks
        rates = 1e4 ** -(torch.arange(0, size, 2, device=input_ids.device) / size)
        angles = torch.outer(torch.arange(length, device=input_ids.device).float(), rates)
        turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]
        hidden = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)
        stream = self.words(input_ids) * self.config.breadth**0.5
        for floor in self.tower:
            stream = floor(stream, turns, hidden)
        scores = self.speak(level(stream, self.last_gain))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(scores[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return {"loss": loss, "logits": scores}
