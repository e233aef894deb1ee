"""A mixture in einsums: rotary pairs on a slice of each head, a norm in a lambda, three stacks of experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class DunlinConfig(PretrainedConfig):
    """Sizes under names of its own."""

    model_type = "dunlin"

    def __init__(self, span: int = 64, flocks: int = 2, wings: int = 4, crowd: int = 8, **rest) -> None:
        self.span, self.flocks, self.wings, self.crowd = span, flocks, wings, crowd
        super().__init__(**rest)


class Flock(nn.Module):
    """Attention by letters, then experts chosen, without grad, among those of the two best groups of four."""

    def __init__(self, config: DunlinConfig) -> None:
        super().__init__()
        width, inner, crowd = config.span, config.span // 2, config.crowd
        self.wings, self.groups, self.chosen = config.wings, 4, 2
        self.gains = nn.Parameter(torch.ones(2, width))
        self.inward = nn.Parameter(torch.randn(3, width, width) / width**0.5)
        self.outward = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.calls = nn.Parameter(torch.randn(crowd, width) / width**0.5)
        self.register_buffer("balance", torch.linspace(-0.02, 0.02, crowd))
        self.gate, self.rise = (nn.Parameter(torch.randn(crowd, width, inner) / width**0.5) for _ in range(2))
        self.fall = nn.Parameter(torch.randn(crowd, inner, width) / inner**0.5)

    def forward(self, stream: torch.Tensor, turns: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        width = stream.shape[-1]
        energy = lambda x: torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).pow(2) / width  # noqa: E731
        level = lambda x, gain: (x.float() * (energy(x) + 1e-5) ** -0.5).type_as(x) * gain  # noqa: E731
        seen = level(stream, self.gains[0])
        q, k, v = (torch.einsum("btd,df->btf", seen, w).unflatten(-1, (self.wings, -1)) for w in self.inward)
        q, k = self.spin(q, turns), self.spin(k, turns)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / (width // self.wings) ** 0.5
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        stream = stream + torch.einsum("bhqk,bkhd->bqhd", shares, v).flatten(-2) @ self.outward
        return stream + self.mix(level(stream, self.gains[1]).view(-1, width)).view_as(stream)

    @staticmethod
    def spin(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        turned, rest = x.split(x.shape[-1] // 2, -1)
        pairs = torch.view_as_complex(turned.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.cat((torch.view_as_real(pairs * turns).flatten(-2).type_as(x), rest), -1)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.sigmoid(x @ self.calls.mT)
        with torch.no_grad():
            values = scores + self.balance
            groups = values.unflatten(-1, (self.groups, -1)).topk(2, -1).values.sum(-1)
            kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, -1).indices, True)
            kept = kept.repeat_interleave(values.shape[-1] // self.groups, 1)
            ids = values.where(kept, torch.tensor(-torch.inf)).topk(self.chosen, -1).indices
        shares = F.normalize(scores.gather(1, ids), p=1, dim=-1)
        each, names = x[:, None].expand(-1, self.chosen, -1).reshape(-1, x.shape[-1]), ids.view(-1)
        gate, up = (torch.einsum("nd,ndf->nf", each, w[names]) for w in (self.gate, self.rise))
        found = torch.einsum("nf,nfd->nd", F.silu(gate) * up, self.fall[names])
        return torch.einsum("tkd,tk->td", found.unflatten(0, (-1, self.chosen)), shares)


class DunlinForCalls(PreTrainedModel):
    """Words in, loss and scores out."""

    config_class = DunlinConfig

    def __init__(self, config: DunlinConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(256, config.span)
        self.sky = nn.ModuleList(Flock(config) for _ in range(config.flocks))
        self.last = nn.RMSNorm(config.span)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **_) -> dict:
        length, pairs = input_ids.shape[1], self.config.span // self.config.wings // 4
        angles = torch.outer(torch.arange(length).float(), 1e4 ** (-torch.arange(pairs) / pairs))
        turns = torch.polar(torch.ones_like(angles), angles)[:, None].to(input_ids.device)
        hidden = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)
        stream = self.words(input_ids)
        for flock in self.sky:
            stream = flock(stream, turns, hidden)
        scores = F.linear(self.last(stream), self.words.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(scores[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return {"loss": loss, "logits": scores}
