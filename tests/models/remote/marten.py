"""A parallel-residual model: a hand-written layer norm, rotations of a part of each head, attention with fewer keys."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class MartenConfig(PretrainedConfig):
    """Sizes under names of its own."""

    model_type = "marten"

    def __init__(
        self, dim: int = 64, n_stage: int = 3, n_q: int = 4, n_kv: int = 2, n_vocab: int = 256, **rest
    ):
        self.dim, self.n_stage, self.n_q, self.n_kv, self.n_vocab = dim, n_stage, n_q, n_kv, n_vocab
        super().__init__(**rest)


class Center(nn.Module):
    """A layer norm from its formula, scale and shift in one tensor."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.affine = nn.Parameter(torch.stack([torch.ones(dim), torch.zeros(dim)]))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        mean = t.mean(-1, keepdim=True)
        spread = (t - mean).pow(2).mean(-1, keepdim=True)
        return (t - mean) * torch.rsqrt(spread + 1e-6) * self.affine[0] + self.affine[1]


def twist(t: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Rotate the first half of each head's columns, halves against each other; the rest stays."""
    size = t.size(-1) // 2
    moved, still = t[..., :size], t[..., size:]
    low, high = moved.split(size // 2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    return torch.cat((moved * c + turned * s, still), dim=-1)


class Stage(nn.Module):
    """Attention and a gated GELU unit side by side, on one norm."""

    def __init__(self, cfg: MartenConfig) -> None:
        super().__init__()
        self.cfg, self.head = cfg, cfg.dim // cfg.n_q
        self.center = Center(cfg.dim)
        self.parts = nn.ModuleDict(
            {
                "qkv": nn.Linear(cfg.dim, (cfg.n_q + 2 * cfg.n_kv) * self.head),
                "o": nn.Linear(cfg.dim, cfg.dim),
                "a": nn.Linear(cfg.dim, 3 * cfg.dim),
                "b": nn.Linear(cfg.dim, 3 * cfg.dim),
                "c": nn.Linear(3 * cfg.dim, cfg.dim),
            }
        )

    def forward(self, t: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor]:
        b, n, _ = t.shape
        u = self.center(t)
        packed = self.parts["qkv"](u).view(b, n, -1, self.head).permute(0, 2, 1, 3)
        q, k, v = packed.split([self.cfg.n_q, self.cfg.n_kv, self.cfg.n_kv], dim=1)
        q, k = twist(q, c, s), twist(k, c, s)
        repeats = self.cfg.n_q // self.cfg.n_kv
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.parts["o"](y.transpose(1, 2).contiguous().view(b, n, -1))
        gate = self.parts["a"](u)
        wave = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * torch.pow(gate, 3))))
        return (t + y + self.parts["c"](wave * self.parts["b"](u)),)


class Core(nn.Module):
    """Embedding, stages, last norm."""

    def __init__(self, cfg: MartenConfig) -> None:
        super().__init__()
        self.lookup = nn.Embedding(cfg.n_vocab, cfg.dim)
        self.stages = nn.Sequential(*(Stage(cfg) for _ in range(cfg.n_stage)))
        self.close = Center(cfg.dim)
        self.size = cfg.dim // cfg.n_q // 2

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        rates = torch.exp(torch.arange(0, self.size, 2, device=ids.device) * (-math.log(1e4) / self.size))
        angles = torch.einsum("n,d->nd", steps, rates).repeat(1, 2)
        c, s = angles.cos(), angles.sin()
        t = self.lookup(ids)
        for stage in self.stages:
            t = stage(t, c, s)[0]
        return self.close(t)


class MartenForText(PreTrainedModel):
    """The core and a head with a soft cap, the loss by hand."""

    config_class = MartenConfig

    def __init__(self, cfg: MartenConfig) -> None:
        super().__init__(cfg)
        self.core = Core(cfg)
        self.out = nn.Linear(cfg.dim, cfg.n_vocab, bias=False)
        self.post_init()

    def forward(self, input_ids, labels=None, **_):
        logits = self.out(self.core(input_ids))
        logits = 30.0 * torch.tanh(logits / 30.0)
        loss = None
        if labels is not None:
            shifted = logits[..., :-1, :].contiguous().view(-1, logits.size(-1))
            loss = nn.CrossEntropyLoss()(shifted, labels[..., 1:].contiguous().view(-1))
        return CausalLMOutputWithPast(loss=loss, logits=logits)
