"""What is a site and what is not, by spelling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from fxopt.graph.anchors import find_anchors
from fxopt.graph.anchors.stock import stock_name

X = torch.randn(2, 3, 8, requires_grad=True)
W = torch.randn(8)
GATE = torch.randn(16, 8, requires_grad=True)
UP = torch.randn(16, 8, requires_grad=True)
PACKED = torch.randn(32, 8, requires_grad=True)
TABLE = torch.randn(3, 8)
ONE = torch.randn(1, 8)
IDS = torch.tensor([[1, 2, 3], [4, -100, 5]])
HEAD = torch.randn(11, 8, requires_grad=True)


P = torch.nn.Parameter(torch.randn(8))
P1 = torch.nn.Parameter(torch.randn(1))
FROZEN = torch.nn.Parameter(torch.randn(8), requires_grad=False)


def picked(x, h, i):
    scores = F.log_softmax(F.linear(x, h)[:, :-1].float(), -1)
    return -scores.gather(-1, i[:, 1:].unsqueeze(-1)).squeeze(-1).mean()


def picked_by_sum(x, h, i):
    logits = F.linear(x, h)
    return (logits.logsumexp(-1) - logits.gather(-1, i[..., None]).squeeze(-1)).mean()


def picked_less_sum(x, h, i):
    logits = F.linear(x, h)
    return -(logits.gather(-1, i[..., None]).squeeze(-1) - logits.logsumexp(-1)).mean()


def by_a_one_hot(x, h, i):
    return -(F.one_hot(i, 11) * F.linear(x, h).log_softmax(-1)).sum(-1).mean()


def by_a_smoothed_one_hot(x, h, i):
    scores = F.log_softmax(F.linear(x, h)[:, :-1].float().reshape(-1, 11), -1)
    target = torch.zeros_like(scores).scatter_(-1, i[:, 1:].reshape(-1, 1), 1.0) * 0.9 + 0.1 / 11
    return torch.sum(-scores * target * W.new_ones(11)) / 4


def by_soft_labels(x, h, t):
    return -(F.linear(x, h).log_softmax(-1) * F.linear(t, h.detach()).softmax(-1)).sum(-1).mean()


def by_soft_labels_and_their_logarithm(x, h, t):
    q = F.linear(t, h.detach()).softmax(-1)
    return (q * (q.log() - F.linear(x, h).log_softmax(-1))).sum(-1).mean()


def divergence(x, h, t):
    scores = F.log_softmax(F.linear(x, h) / 2.0, dim=-1).view(-1, 11)
    return F.kl_div(scores, F.linear(t, h.detach()).softmax(-1).view(-1, 11), reduction="batchmean")


def entropy(x):
    return -(x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean()


def masked_entropy(x, i):
    scores = F.log_softmax(x.float() / 2, -1)
    return (-(scores.exp().detach() * scores) * (i > 0)[..., None]).sum(-1).mean()


def from_a_frozen_policy(x, t):
    scores, others = x.log_softmax(-1), t.log_softmax(-1)
    return (scores.exp() * (scores - others)).sum(-1).mean()


def balanced_choices(x):
    """Return the auxiliary loss of a router: the mean probability of each expert times how often it was chosen."""
    scores = x.view(-1, 8).softmax(-1)
    often = F.one_hot(scores.topk(2)[1], 8).float().mean(0)
    return (often * scores.mean(0)).sum()


def over_tokens(x):
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


def deviation(x):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)


def wide_deviation(x):
    centred = x - x.mean(-1, keepdim=True)
    return (centred / (x.std(-1, keepdim=True).float() + 1e-6)).to(x.dtype)


def gelu_by_hand(x):
    return 0.5 * x * (1.0 + torch.tanh(0.79788456 * (x + 0.044715 * x.pow(3.0))))


def centred(x, w):
    x = x - x.mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def two_outputs(x):
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * r, x.abs() * r


def clamped(x, g, u):
    gate, up = F.linear(x, g).clamp(max=7.0), F.linear(x, u).clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def packed(x, p):
    gate, up = F.linear(x, p).chunk(2, dim=-1)
    return up * F.silu(gate)


def interleaved(x, p):
    y = F.linear(x, p)
    return F.gelu(y[..., ::2]) * y[..., 1::2]


def adapted(x, g, u):
    gate = F.linear(x, g) + 0.5 * F.linear(F.linear(x, u[:4]), g[:, :4])
    return F.silu(gate) * F.linear(x, u)


def in_place(x, g, u):
    y = F.silu(F.linear(x, g))
    y *= F.linear(x, u)
    return y


def attention(x, g, u):
    scores = F.softmax(F.linear(x, g) @ F.linear(x, u).mT, -1)
    return (scores @ F.linear(x, u)) * torch.sigmoid(F.linear(x, g))


def masked_attention(x, g, u):
    scores = (
        torch.bmm(F.linear(x, g), F.linear(x, u).mT)
        .view(1, 2, 3, 3)
        .masked_fill(torch.ones(3, 3).tril() == 0, -1e9)
    )
    scores = torch.max(scores, torch.tensor(-1e9)).view(2, 3, 3)
    return torch.bmm(F.softmax(scores, -1), F.linear(x, u))


def between_adapted(x, g, u):
    y = F.silu(F.linear(x, g) + 0.5 * F.linear(F.linear(x, u[:4]), g[:, :4]))
    return F.linear(y, g.t()) + F.linear(F.linear(F.dropout(y, 0.1), u.t()[:4]), g.t()[:, :4])


def rotated(x, cos):
    q = F.linear(x, x[0, :, :].detach().mT @ x[0].detach())
    return q * cos.cos() + torch.cat((-q[..., 4:], q[..., :4]), -1) * cos.sin()


def neighbours_rotated(x, cos):
    xf = x.float()
    turned = torch.stack([-xf[..., 1::2], xf[..., ::2]], dim=-1).flatten(-2)
    return ((xf * cos.cos()) + (turned * cos.sin())).to(x.dtype)


def rotated_backwards(x, cos):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((b, -a), -1) * cos


def rotated_in_part(x, cos):
    inside, passed = x.split([4, 4], -1)
    return torch.cat(
        (inside * cos[:, :4] + torch.cat((-inside[..., 2:], inside[..., :2]), -1) * cos[:, 4:], passed), -1
    )


def halves_rotated_apart(x, cos):
    a, b = x[..., :4], x[..., 4:]
    c, s = cos.chunk(2, -1)
    return torch.cat((a * c - b * s, b * c + a * s), -1)


def lanes_rotated(x, cos):
    a, b = x.reshape(2, 3, 4, 2).unbind(-1)
    c, s = cos.chunk(2, -1)
    return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)


def rotated_as_complex(x, cos):
    turns = torch.polar(torch.ones_like(cos[:, :4]), cos[:, :4])
    pairs = torch.view_as_complex(x.float().reshape(2, 3, 4, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


def complex_product(x, w):
    a, b, c, d = x[..., :4], x[..., 4:], w[..., :4], w[..., 4:]
    return torch.cat((a.tanh() * c - b.tanh() * d, a.tanh() * d + b.tanh() * c), -1)


CHOSEN = torch.tensor([2, 0, 1, 1, 0, 2])
STACK = torch.randn(3, 8, 8, requires_grad=True)
ROWS = torch.randn(3, 8, requires_grad=True)


def by_copies(x, w):
    rows = torch.bmm(w[CHOSEN], x.repeat_interleave(2, 0).unsqueeze(-1)).squeeze(-1)
    return (rows * 0.5).view(3, 2, 8).sum(1)


def in_order(x, w):
    rows = F.grouped_mm(x.bfloat16(), w.bfloat16(), offs=torch.tensor([1, 2, 3], dtype=torch.int32))
    return (rows.view(3, 1, 8) + 1.0).sum(dim=1)


def by_all(x, w):
    return torch.bmm(x.repeat(3, 1).view(3, -1, 8), w).sum(dim=0)


def chosen_to_copy(x, w):
    weights, ids = x[:, :3].softmax(-1).topk(2)
    return w[ids.reshape(-1)].sum() * weights.sum()


def chosen_and_put_in_order(x, w):
    ids = x[:, :3].topk(2)[1].flatten()
    return w[ids[ids.argsort()]].sum()


def places_of_choices(x, w):
    """Return a sum over rows at the places where choices stand, which are no ids."""
    return w[x[:, :3].topk(2)[1].flatten().argsort() // 2].sum()


def chosen_to_count(x):
    return x.topk(2, dim=-1).indices.flatten().sort()[0].float().histc(bins=8, min=0, max=7)


def chosen_to_count_integers(x):
    ids = x.topk(2, dim=-1).indices.flatten().sort()[0]
    return ids.int().float().histc(bins=8, min=0, max=7)  # a GPU counts the integers, a CPU has to cast them


def chosen_of_the_best_group(x):
    best = x.view(3, 2, 4).amax(-1).topk(1)[1]
    mask = torch.zeros(3, 2).scatter_(1, best, 1).repeat_interleave(4, -1)
    return chosen_to_count(x.masked_fill(mask == 0, -1.0))


def chosen_to_mask(x):
    return x * torch.zeros_like(x).scatter(-1, x.topk(2)[1], 1.0)


def counted_values(x):
    return x.topk(2)[0].histc(bins=8, min=0, max=7)


def one_head_each(x, w):
    return torch.bmm(x.view(3, 1, 8), w).view(1, 3, 8).sum(dim=0)


SITES = {
    "experts by copies": (by_copies, (ROWS, STACK), ["experts"]),
    "experts in order": (in_order, (ROWS, STACK), ["experts"]),
    "experts, each for all": (by_all, (ROWS, STACK), ["experts"]),
    "a stack that nothing chooses from": (one_head_each, (ROWS, STACK), []),
    "rows that no matrix multiplied": (lambda x: x[CHOSEN].view(3, 2, 8).sum(1), (ROWS,), []),
    "a choice of matrices": (chosen_to_copy, (ROWS, STACK), ["route"]),
    "a choice of matrices, in order": (chosen_and_put_in_order, (ROWS, STACK), ["route"]),
    "places where choices stand": (places_of_choices, (ROWS, STACK), []),
    "a choice that is counted": (chosen_to_count, (ROWS.detach(),), ["route"]),
    "a choice that is counted as on a GPU": (chosen_to_count_integers, (ROWS.detach(),), ["route"]),
    "a choice among the best group": (chosen_of_the_best_group, (ROWS.detach(),), ["route"]),
    "a choice that is a mask": (chosen_to_mask, (ROWS,), []),
    "largest values that are counted": (counted_values, (ROWS.detach(),), []),
    "rsqrt": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        (X, W),
        ["rms_norm"],
    ),
    "rsqrt in float32": (
        lambda x: (y := x.float()) * torch.rsqrt((y * y).mean(dim=2, keepdim=True).add(1e-6)),
        (X.detach().bfloat16(),),
        ["rms_norm"],
    ),
    "pow": (lambda x: x * torch.pow(x.square().mean(-1, keepdim=True) + 1e-6, -0.5), (X,), ["rms_norm"]),
    "one over root": (lambda x: x * (1 / torch.sqrt((x**2).mean(-1, True) + 1e-6)), (X,), ["rms_norm"]),
    "divided by root": (lambda x: x / torch.sqrt(torch.mean(x**2, -1, True) + 1e-6), (X,), ["rms_norm"]),
    "divided by power": (lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6) ** 0.5, (X,), ["rms_norm"]),
    "sum of squares": (lambda x: x * torch.rsqrt(x.pow(2).sum(-1, True) / 8 + 1e-6), (X,), ["rms_norm"]),
    "divided by norm": (lambda x: x / (x.norm(2, dim=-1, keepdim=True) * 8**-0.5 + 1e-6), (X,), ["rms_norm"]),
    "a dim given back": (
        lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1)[..., None] + 1e-6) * w,
        (X, W),
        ["rms_norm"],
    ),
    "a dim given back, by view": (
        lambda x: x / torch.sqrt(1e-6 + x.square().mean(2).view(2, 3, 1)),
        (X,),
        ["rms_norm"],
    ),
    "one of many means": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1)[:, :1, None] + 1e-6), (X,), []),
    "squares by einsum": (
        lambda x: x * torch.rsqrt(torch.einsum("btd, btd -> bt", x, x)[..., None] / 8 + 1e-6),
        (X,),
        ["rms_norm"],
    ),
    "no squares by einsum": (
        lambda x: x * torch.rsqrt(torch.einsum("btd,btd->bt", x, x.abs())[..., None] / 8 + 1e-6),
        (X,),
        [],
    ),
    "by its name": (lambda x, w: F.rms_norm(x, (8,), w, 1e-6), (X, W), ["rms_norm"]),
    "centred": (centred, (X, W), ["rms_norm"]),
    "one root for two outputs": (two_outputs, (X,), ["rms_norm"]),
    "a length, not a norm": (lambda x: x * torch.rsqrt(x.pow(2).sum(-1, True) + 1e-6), (X,), []),
    "clipped, not normed": (
        lambda x: x * (3.0 / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-6)).clamp(max=1.0),
        (X,),
        [],
    ),
    "layer norm": (lambda x, w: F.layer_norm(x, (8,), w), (X, W), ["layer_norm"]),
    "layer norm by hand": (lambda x, w: centred(x, w) + w, (X, W), ["layer_norm"]),
    "layer norm of a variance": (
        lambda x, w: w + (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, False, True) + 1e-5) * w,
        (X, W),
        ["layer_norm"],
    ),
    "a bias without a mean": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) + w,
        (X, W),
        ["rms_norm"],
    ),
    "a skip is no bias": (lambda x, w: centred(x, w) + x, (X, W), ["rms_norm"]),
    "a root of something else": (lambda x: x * torch.rsqrt(x.abs().mean(-1, True) + 1), (X,), []),
    "a mean over tokens": (lambda x: x * torch.rsqrt(x.pow(2).mean(1, True) + 1), (X,), []),
    "silu": (lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u), (X, GATE, UP), ["glu"]),
    "up first": (lambda x, g, u: F.linear(x, u) * F.gelu(F.linear(x, g)), (X, GATE, UP), ["glu"]),
    "gelu by hand": (lambda x, g, u: gelu_by_hand(F.linear(x, g)) * F.linear(x, u), (X, GATE, UP), ["glu"]),
    "silu by hand": (
        lambda x, g, u: ((y := F.linear(x, g)) * torch.sigmoid(y)) * F.linear(x, u),
        (X, GATE, UP),
        ["glu"],
    ),
    "squared relu": (
        lambda x, g, u: F.relu(F.linear(x, g)).square() * F.linear(x, u),
        (X, GATE, UP),
        ["glu"],
    ),
    "clamped and shifted": (clamped, (X, GATE, UP), ["glu"]),
    "packed": (packed, (X, PACKED), ["glu"]),
    "interleaved": (interleaved, (X, PACKED), ["glu"]),
    "with an adapter": (adapted, (X, GATE, UP), ["lora_linear", "glu"]),
    "viewed": (
        lambda x, g, u: F.silu(F.linear(x, g)).view(-1, 16) * F.linear(x, u).view(-1, 16),
        (X, GATE, UP),
        ["glu"],
    ),
    "in place": (in_place, (X, GATE, UP), ["glu"]),
    "with dropout": (
        lambda x, g, u: F.dropout(F.silu(F.linear(x, g)), 0.1) * F.linear(x, u).float(),
        (X, GATE, UP),
        ["glu"],
    ),
    "an activation alone": (lambda x, g: F.silu(F.linear(x, g)), (X, GATE), []),
    "an activation by hand": (lambda x, g: gelu_by_hand(F.linear(x, g)), (X, GATE), []),
    "between projections": (lambda x, g: F.linear(F.gelu(F.linear(x, g)), g.t()), (X, GATE), ["activation"]),
    "by hand between projections": (
        lambda x, g: gelu_by_hand(F.linear(x, g)) @ g,
        (X, GATE),
        ["activation"],
    ),
    "squared between projections": (
        lambda x, g: F.linear(torch.square(torch.relu(F.linear(x, g))), g.t()),
        (X, GATE),
        ["activation"],
    ),
    "between adapted projections": (
        between_adapted,
        (X, GATE, UP),
        ["lora_linear", "activation", "lora_linear"],
    ),
    "with a bias of its own": (
        lambda x, g: torch.addmm(g[0], F.gelu(torch.addmm(g[:, 0], x[0], g.t())), g),
        (X, GATE),
        ["activation"],
    ),
    "before a norm": (
        lambda x, g: F.linear(F.layer_norm(F.gelu(F.linear(x, g)), (16,)), g.t()),
        (X, GATE),
        ["layer_norm"],
    ),
    "of an input": (lambda x, g: F.linear(F.gelu(x), g), (X, GATE), []),
    "times a weight": (lambda x, g: F.linear(F.gelu(F.linear(x, g)) * g[:, 0], g.t()), (X, GATE), []),
    "a soft cap": (lambda x, g: 30 * torch.tanh(F.linear(x, g) / 30), (X, GATE), []),
    "a gate of one column": (
        lambda x, g, o: torch.sigmoid(F.linear(x, o)) * F.linear(x, g),
        (X, GATE, ONE),
        [],
    ),
    "attention in one call with its projections": (
        lambda x, g, u: F.multi_head_attention_forward(
            *(x, x, x, 8, 2, torch.cat((g, u[:8])), None, None, None, False, 0.0, u[8:], None),
            need_weights=False,
        )[0],
        (X, GATE, UP),
        ["attention"],
    ),
    "a gated attention": (attention, (X, GATE, UP), ["attention"]),
    "a masked attention of joined heads": (masked_attention, (X, GATE, UP), ["attention"]),
    "rotated": (rotated, (X, TABLE), ["rope"]),
    "rotated twice": (lambda x, c: rotated(rotated_backwards(x, c), c), (X, TABLE), ["rope", "rope"]),
    "neighbours rotated": (neighbours_rotated, (X.detach().bfloat16(), TABLE), ["rope"]),
    "rotated backwards": (rotated_backwards, (X, TABLE), ["rope"]),
    "rotated in part": (rotated_in_part, (X, TABLE), ["rope"]),
    "halves rotated apart": (halves_rotated_apart, (X, TABLE), ["rope"]),
    "lanes rotated": (lanes_rotated, (X, TABLE), ["rope"]),
    "rotated as complex numbers": (rotated_as_complex, (X, TABLE), ["rope"]),
    "a turn by a quarter": (lambda x: torch.cat((-x[..., 4:], x[..., :4]), -1), (X,), []),
    "halves of two tensors": (
        lambda x, t: torch.cat((-x[..., 4:], x[..., :4].tanh()), -1) * t,
        (X, TABLE),
        [],
    ),
    "one half twice": (lambda x, t: torch.cat((-x[..., 4:], x[..., 4:]), -1) * t, (X, TABLE), []),
    "a product of complex numbers": (complex_product, (X, W), []),
    "a bilinear product": (lambda x, g, u: F.linear(x, g) * F.linear(x, u), (X, GATE, UP), []),
    "loss of a head": (
        lambda x, h, i: F.cross_entropy(F.linear(x, h).float().view(-1, 11), i.view(-1)),
        (X, HEAD, IDS),
        ["linear_cross_entropy"],
    ),
    "loss of a capped head": (
        lambda x, h, i: F.cross_entropy(
            (torch.tanh((x @ h.T) / 30) * 30)[:, :2].flatten(0, 1), i[:, 1:].flatten()
        ),
        (X, HEAD, IDS),
        ["linear_cross_entropy"],
    ),
    "loss of a head with a bias after it": (
        lambda x, h, i: F.cross_entropy((F.linear(x, h) + h[:, 0]).view(-1, 11), i.view(-1)),
        (X, HEAD, IDS),
        ["linear_cross_entropy"],
    ),
    "loss of a head, less its largest": (
        lambda x, h, i: F.cross_entropy(
            (y := F.linear(x, h).view(-1, 11)) - y.amax(-1, keepdim=True), i.view(-1)
        ),
        (X, HEAD, IDS),
        ["linear_cross_entropy"],
    ),
    "loss of a masked head": (
        lambda x, h, i: F.cross_entropy(
            torch.where(h[:, 0] > 0, F.linear(x, h).float(), -1e4).flatten(0, 1), i.view(-1)
        ),
        (X, HEAD, IDS),
        ["linear_cross_entropy"],
    ),
    "loss of a normed head": (
        lambda x, h, i: F.cross_entropy(F.softmax(F.linear(x, h), -1).view(-1, 11), i.view(-1)),
        (X, HEAD, IDS),
        ["cross_entropy"],
    ),
    "loss by its halves": (
        lambda x, h, i: F.nll_loss(F.log_softmax(F.linear(x, h).view(-1, 11), -1), i.view(-1)),
        (X, HEAD, IDS),
        ["linear_cross_entropy"],
    ),
    "loss of logits": (lambda x, i: F.cross_entropy(x.view(-1, 8), i.view(-1)), (X, IDS), ["cross_entropy"]),
    "loss of a sum": (
        lambda x, h, i: F.cross_entropy((F.linear(x, h) + F.linear(x, 2 * h)).view(-1, 11), i.view(-1)),
        (X, HEAD, IDS),
        ["cross_entropy"],
    ),
    "loss picked by class": (picked, (X, HEAD, IDS.clamp(min=0)), ["linear_cross_entropy"]),
    "loss picked by a logsumexp": (picked_by_sum, (X, HEAD, IDS.clamp(min=0)), ["linear_cross_entropy"]),
    "loss picked, less a logsumexp": (picked_less_sum, (X, HEAD, IDS.clamp(min=0)), ["linear_cross_entropy"]),
    "loss picked by an index": (
        lambda x, h, i: -F.linear(x, h).view(-1, 11).log_softmax(-1)[torch.arange(6), i.view(-1)].mean(),
        (X, HEAD, IDS.clamp(min=0)),
        ["linear_cross_entropy"],
    ),
    "loss picked of logits": (
        lambda x, i: x.log_softmax(-1).gather(-1, i[..., None]).mean(),
        (X, IDS.clamp(min=0)),
        ["cross_entropy"],
    ),
    "loss by a one-hot": (by_a_one_hot, (X, HEAD, IDS.clamp(min=0)), ["linear_cross_entropy"]),
    "loss by a one-hot of logits": (
        lambda x, i: -(F.one_hot(i, 8) * x.log_softmax(-1)).sum(),
        (X, IDS.clamp(min=0)),
        ["cross_entropy"],
    ),
    "loss by a smoothed one-hot": (
        by_a_smoothed_one_hot,
        (X, HEAD, IDS.clamp(min=0)),
        ["linear_cross_entropy"],
    ),
    "loss by soft labels": (by_soft_labels, (X, HEAD, X.detach() + 1), ["linear_cross_entropy"]),
    "loss by soft labels and their logarithm": (
        by_soft_labels_and_their_logarithm,
        (X, HEAD, X.detach() + 1),
        ["linear_cross_entropy"],
    ),
    "loss by soft labels that were given": (
        lambda x, t: -(x.log_softmax(-1) * t).sum(-1).mean(),
        (X, X.detach()),
        ["cross_entropy"],
    ),
    "a divergence": (divergence, (X, HEAD, X.detach() + 1), ["linear_cross_entropy"]),
    "a divergence from logarithms": (
        lambda x, t: torch.nn.KLDivLoss(reduction="sum", log_target=True)(
            x.log_softmax(-1), t.log_softmax(-1)
        ),
        (X, X.detach()),
        ["cross_entropy"],
    ),
    "a divergence of values": (lambda x, t: F.kl_div(x, t, reduction="sum"), (X, X.detach()), []),
    "an entropy": (entropy, (X,), []),
    "an entropy of some rows": (masked_entropy, (X, IDS), []),
    "a divergence from a frozen policy": (from_a_frozen_policy, (X, X.detach() + 1), []),
    "log-probabilities of rows weighed": (
        lambda x, i: (x.log_softmax(-1) * (i > 0)[..., None]).sum(-1).mean(),
        (X, IDS),
        [],
    ),
    "log-probabilities weighed and summed over tokens": (
        lambda x, t: (x.log_softmax(-1) * t).sum(1).abs().mean(),
        (X, X.detach()),
        [],
    ),
    "probabilities times a one-hot": (
        lambda x, i: (F.one_hot(i, 8) * x.softmax(-1)).sum(-1).mean(),
        (X, IDS.clamp(min=0)),
        [],
    ),
    "choices that are balanced": (balanced_choices, (X,), []),
    "log-probabilities of the best": (
        lambda x, i: x.log_softmax(-1).gather(-1, x.topk(2)[1]).mean(),
        (X, IDS),
        [],
    ),
    "probabilities picked": (
        lambda x, i: x.softmax(-1).gather(-1, i[..., None]).mean(),
        (X, IDS.clamp(min=0)),
        [],
    ),
    "logits picked and others summed": (
        lambda x, h, i: (x.logsumexp(-1) - F.linear(x, h).gather(-1, i[..., None])[..., 0]).mean(),
        (X, HEAD, IDS.clamp(min=0)),
        [],
    ),
    "norm over tokens": (lambda x, w: w * over_tokens(x), (X, P), ["rms_norm"]),
    "data scaled over tokens": (over_tokens, (X,), []),
    "data scaled over tokens, masked": (lambda x, t: t * over_tokens(x), (X, TABLE), []),
    "norm over tokens, frozen": (lambda x, w: w * over_tokens(x), (X, FROZEN), ["rms_norm"]),
    "norm of lengths over tokens": (
        lambda x, w: w * (x * torch.rsqrt(x.norm(2, 1, keepdim=True).square() / 3 + 1e-6)),
        (X, P),
        ["rms_norm"],
    ),
    "norm of lengths over two dims": (
        lambda x, w: w * (x * torch.rsqrt(x.norm(2, (0, 1), keepdim=True).square() / 6 + 1e-6)),
        (X, P),
        [],
    ),
    "norm by a deviation": (lambda x, w: w * deviation(x), (X, P), ["rms_norm"]),
    "norm by a deviation with a bias": (lambda x, w: w * deviation(x) + w, (X, P), ["layer_norm"]),
    "norm by a deviation with casts and a bias": (
        lambda x, w: (w * wide_deviation(x)).float() + w,
        (X.detach().bfloat16(), P),
        ["layer_norm"],
    ),
    "deviation alone": (lambda x: x.std(-1).mean(), (X,), []),
    "norm by a length": (lambda x, w: F.normalize(x, dim=-1) * 8**0.5 * w, (X, P), ["rms_norm"]),
    "norm by a length, weight first": (
        lambda x, w: w * F.normalize(x, dim=-1) * 8**0.5,
        (X, P),
        ["rms_norm"],
    ),
    "norm by a length over the default dim": (
        lambda x, w: F.normalize(x) * 8**0.5 * w,
        (ROWS, P),
        ["rms_norm"],
    ),
    "a length over tokens": (lambda x, w: F.normalize(x) * 8**0.5 * w, (X, P), []),
    "norm by a length given by place": (
        lambda x, w: F.normalize(x, 2.0, -1) * 8**0.5 * w,
        (X, P),
        ["rms_norm"],
    ),
    "norm by a length that divides": (
        lambda x, w: x / x.norm(2, -1, keepdim=True) * 8**0.5 * w,
        (X, P),
        ["rms_norm"],
    ),
    "a sum of magnitudes": (lambda x, w: F.normalize(x, p=1, dim=-1) * 8**0.5 * w, (X, P), []),
    "a sum of magnitudes by place": (lambda x, w: F.normalize(x, 1.0, -1) * 8**0.5 * w, (X, P), []),
    "a sum of magnitudes that divides": (
        lambda x, w: x / x.norm(1, -1, keepdim=True) * 8**0.5 * w,
        (X, P),
        [],
    ),
    "divided by its name": (
        lambda x, w: torch.div(x, other=x.norm(2, -1, keepdim=True)) * 8**0.5 * w,
        (X, P),
        ["rms_norm"],
    ),
    "divided by a root by its name": (
        lambda x: torch.div(x, other=torch.sqrt(x.pow(2).mean(-1, True) + 1e-6)),
        (X,),
        ["rms_norm"],
    ),
    "deviation by its name": (
        lambda x, w: w * torch.div(x - x.mean(-1, True), other=x.std(-1, keepdim=True) + 1e-6),
        (X, P),
        ["rms_norm"],
    ),
    "length one, weighed": (lambda x, w: w * F.normalize(x, dim=-1), (X, P), ["rms_norm"]),
    "length one, weighed in another dtype": (
        lambda x, w: F.normalize(x.float(), dim=-1).to(x.dtype) * w,
        (X.detach().bfloat16(), P),
        ["rms_norm"],
    ),
    "queries of length one, weighed": (
        lambda x, g, w: F.normalize(F.linear(x, g).view(2, 3, 2, 8), dim=-1) * w,
        (X, GATE, P),
        ["rms_norm"],
    ),
    "length one by a division, weighed": (
        lambda x, w: x / (x.norm(dim=-1, keepdim=True) + 1e-6) * w,
        (X, P),
        ["rms_norm"],
    ),
    "queries of length one": (
        lambda x, g, u: F.normalize(F.linear(x, g), dim=-1) @ F.normalize(F.linear(x, u), dim=-1).mT,
        (X, GATE, UP),
        [],
    ),
    "length one over tokens, weighed": (lambda x, w: w * F.normalize(x, dim=1), (X, P), []),
    "length one, times a number that is trained": (lambda x, w: w * F.normalize(x, dim=-1), (X, P1), []),
    "a weight of length one, weighed": (
        lambda x, w, v: x * (v * F.normalize(w, dim=-1)),
        (X, P, FROZEN),
        [],
    ),
    "another value by a length, weighed": (
        lambda x, t, w: t / x.norm(dim=-1, keepdim=True) * w,
        (X, TABLE, P),
        [],
    ),
    "length one, scaled": (lambda x: F.normalize(x, dim=-1) * 20.0, (X,), []),
    "another loss": (lambda x: F.mse_loss(x, x.detach() * 2), (X,), []),
}


@pytest.mark.parametrize("name", SITES)
def test_sites(name, capture, canonical) -> None:
    function, inputs, kinds = SITES[name]
    captured = capture(function, *inputs)
    anchors = find_anchors(captured.gm)
    assert [anchor.kind for anchor in anchors] == kinds
    # Whoever matches the canonical graph can tell which site a node belongs to.
    gm = canonical(captured)
    assert {anchor.node for anchor in anchors} <= {
        name for node in gm.graph.nodes for name in node.meta["origins"]
    }


def test_a_package_whose_name_begins_with_torch_is_not_torch() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for module, name in (
        ("torchao.ops", ""),
        ("torch_foo", ""),
        ("torch", "linear"),
        ("torch.ao.nn", "linear"),
    ):

        def linear(x):
            return x

        linear.__module__ = module
        assert stock_name(graph.call_function(linear, (x,))) == name, module


def test_an_anchor_says_where_it_is(capture) -> None:
    function, inputs, _ = SITES["silu"]
    (anchor,) = find_anchors(capture(function, *inputs).gm)
    assert (anchor.module, anchor.location.split(":")[0]) == ("", "test_anchors.py")
