"""A hybrid: linear attention with a decaying state and full attention in turn, and experts in a loop after each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


class SedgeConfig(PretrainedConfig):
    """Sizes under names of its own."""

    model_type = "sedge"

    def __init__(
        self, d: int = 64, depth: int = 4, h: int = 4, pool: int = 4, pick: int = 2, v: int = 256, **rest
    ):
        self.d, self.depth, self.h, self.pool, self.pick, self.v = d, depth, h, pool, pick, v
        super().__init__(**rest)


class Root(nn.Module):
    """A root-mean-square norm, times a gate's SiLU where there is one."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(d))

    def forward(self, t: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        kind = t.dtype
        t = t.float()
        t = t * torch.pow(t.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)
        t = self.g * t.to(kind)
        return t if gate is None else t * F.silu(gate.float()).to(kind)


class Flow(nn.Module):
    """Linear attention: what a token adds decays with its distance, all distances at once."""

    def __init__(self, cfg: SedgeConfig) -> None:
        super().__init__()
        self.h = cfg.h
        self.into = nn.Linear(cfg.d, 4 * cfg.d, bias=False)
        self.fade = nn.Linear(cfg.d, cfg.h)
        self.even = Root(cfg.d // cfg.h)
        self.back = nn.Linear(cfg.d, cfg.d, bias=False)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        b, n, d = t.shape
        q, k, v, z = (each.view(b, n, self.h, -1).transpose(1, 2) for each in self.into(t).chunk(4, -1))
        past = F.logsigmoid(self.fade(t)).transpose(1, 2).cumsum(-1)
        lower = torch.ones(n, n, dtype=torch.bool, device=t.device).tril()
        decay = (past[..., :, None] - past[..., None, :]).masked_fill(~lower, float("-inf")).exp()
        mixed = (q @ k.transpose(-1, -2) * decay) @ v
        return self.back(self.even(mixed, z).transpose(1, 2).reshape(b, n, d))


class Look(nn.Module):
    """Full attention, without positions."""

    def __init__(self, cfg: SedgeConfig) -> None:
        super().__init__()
        self.h = cfg.h
        self.into = nn.Linear(cfg.d, 3 * cfg.d, bias=False)
        self.back = nn.Linear(cfg.d, cfg.d, bias=False)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        b, n, d = t.shape
        q, k, v = (each.view(b, n, self.h, -1).transpose(1, 2) for each in self.into(t).chunk(3, -1))
        return self.back(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, d)
        )


class Leaf(nn.Module):
    """One expert."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(d, 2 * d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.three(F.silu(self.one(t)) * self.two(t))


class Grove(nn.Module):
    """The best few of a pool of experts for each token, one expert after the other; returns the scores too."""

    def __init__(self, cfg: SedgeConfig) -> None:
        super().__init__()
        self.pick = cfg.pick
        self.judge = nn.Linear(cfg.d, cfg.pool, bias=False)
        self.leaves = nn.ModuleList(Leaf(cfg.d) for _ in range(cfg.pool))

    def forward(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = t.reshape(-1, t.shape[-1])
        scores = self.judge(flat)
        share, chosen = scores.softmax(-1).topk(self.pick, -1)
        share = share / share.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number, leaf in enumerate(self.leaves):
            row, place = torch.where(chosen == number)
            out.index_add_(0, row, leaf(flat[row]) * share[row, place, None])
        return out.view_as(t), scores


class Bed(nn.Module):
    """A mixer and experts, each on a norm and added."""

    def __init__(self, cfg: SedgeConfig, number: int) -> None:
        super().__init__()
        self.first, self.second = Root(cfg.d), Root(cfg.d)
        self.mixer = Look(cfg) if number % 2 else Flow(cfg)
        self.grove = Grove(cfg)

    def forward(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = t + self.mixer(self.first(t))
        grown, scores = self.grove(self.second(t))
        return t + grown, scores


class SedgeForGrowth(PreTrainedModel):
    """Beds, a head whose weight is the embedding's, and a loss that asks for even use of the experts."""

    config_class = SedgeConfig

    def __init__(self, cfg: SedgeConfig) -> None:
        super().__init__(cfg)
        self.seed = nn.Embedding(cfg.v, cfg.d)
        self.beds = nn.ModuleList(Bed(cfg, number) for number in range(cfg.depth))
        self.top = Root(cfg.d)
        self.post_init()

    def forward(self, input_ids, labels=None, **_):
        t, all_scores = self.seed(input_ids), ()
        for bed in self.beds:
            t, scores = bed(t)
            all_scores += (scores,)
        logits = F.linear(self.top(t), self.seed.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, self.config.v), labels[:, 1:].reshape(-1))
            chances = torch.cat(all_scores).softmax(-1)
            used = (
                F.one_hot(chances.topk(self.config.pick, -1).indices, self.config.pool).float().mean((0, 1))
            )
            loss = loss + 0.02 * self.config.pool * (used * chances.mean(0)).sum()
        return ModelOutput(loss=loss, logits=logits)
