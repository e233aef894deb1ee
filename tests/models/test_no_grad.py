"""What runs with gradients off within a forward, or writes past autograd, has the gradients of stock."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt

WIDTH, CLASSES = 8, 16

COPIES: dict[str, Callable[[torch.Tensor], Any]] = {
    "view": lambda h: h.view(h.shape),
    "times one": lambda h: h * 1,
    "clone": torch.clone,
    "transposed twice": lambda h: h.transpose(0, 1).transpose(0, 1),
    "wider and back": lambda h: h.double().float(),
    "slice": lambda h: h[:, :],
    "reshaped twice": lambda h: h.reshape(-1, 2, WIDTH // 2).reshape(-1, WIDTH),
    "contiguous": torch.Tensor.contiguous,
    "same dtype": torch.Tensor.float,
}
WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "clamp_": lambda h: h.clamp_(-1, 1),
    "add_": lambda h: h.add_(1),
    "mul_": lambda h: h.mul_(2),
    "relu": lambda h: F.relu(h, inplace=True),
    "masked_fill_": lambda h: h.masked_fill_(h > 1, 0.5),
}


def written_between(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    held = h.data
    squares = h.pow(2).mean(-1, keepdim=True)
    held.mul_(2)
    return h * torch.rsqrt(squares + 1e-6) * weight


def written_between_views(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    held = h.detach()
    root = torch.rsqrt(h.double().pow(2).mean(-1, keepdim=True) + 1e-6)
    held.mul_(2)
    return weight * (h.double() * root).float()


def written_after(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
    h.data.mul_(2)
    return y + h


def written_in_a_product(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    held, gate = h.data, F.silu(h)
    held.mul_(2)
    return gate * h * weight


def read_after(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return h * weight.data.abs().max() + h.data


PAST_AUTOGRAD: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    each.__name__: each
    for each in (written_between, written_between_views, written_after, written_in_a_product, read_after)
}


class Block(nn.Module):
    """A norm, something done to its result with gradients off or past autograd, and a layer."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.norm, self.linear, self.way = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, weight = self.norm(x), self.linear.weight
        if self.way in PAST_AUTOGRAD:
            h = PAST_AUTOGRAD[self.way](h, self.norm.weight)
        if self.way in COPIES:
            with torch.no_grad():
                h = COPIES[self.way](h)
        elif self.way in WRITES:
            with torch.no_grad():
                WRITES[self.way](h)
        elif self.way == "transposed weight":
            with torch.no_grad():
                weight = weight.t()
            return x + torch.matmul(h, weight).tanh()
        elif self.way == "inference":
            with torch.inference_mode():
                held = h * 1
            h = h + held.clone()
        elif self.way == "product in inference":
            with torch.inference_mode():
                held = self.linear(h.detach())
            h = h + held.clone()
        elif self.way == "out of inference":
            with torch.inference_mode():
                held = h * 2
            return x + F.linear(h, weight) * held.clone()
        elif self.way == "read in both modes":
            with torch.no_grad():
                held = h.view(h.shape)
            h = h + held
        return x + F.linear(h, weight).tanh()


class Blocks(nn.Module):
    """Three of them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block(way) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def compare(tools: Any, model: nn.Module, stock: nn.Module, *batch: torch.Tensor) -> None:
    for each in (model, stock):
        loss = each(*batch)
        (loss[0] if isinstance(loss, tuple) else loss).backward()
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            assert tools.relative(ours.grad, theirs.grad) < 1e-5, name


@pytest.mark.parametrize("way", [*COPIES, *WRITES, "transposed weight", "read in both modes"])
def test_with_gradients_off_as_stock(way: str, tools: Any) -> None:
    torch.manual_seed(0)
    model = Blocks(way).train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    compare(tools, model, stock, torch.randn(6, WIDTH))
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert [(site.pattern, site.status) for site in report.sites] == [("rms_norm", "rewritten")]


@pytest.mark.parametrize("way", ["inference", "out of inference", "product in inference"])
def test_inference_mode_within_a_block_runs_stock_and_says_so(way: str, tools: Any) -> None:
    torch.manual_seed(0)
    model = Blocks(way).train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    for _ in range(2):
        compare(tools, model, stock, torch.randn(6, WIDTH))
    (block,) = (each for each in fxopt.explain(model).fallbacks if each.region == "layers")
    assert "torch.inference_mode() within it, which cannot be compiled for training" in block.reason
    assert "test_no_grad.py:" in block.reason


@pytest.mark.parametrize("way", PAST_AUTOGRAD)
def test_writes_past_autograd_as_stock(way: str, tools: Any) -> None:
    """Stock's gradients are those of the values that backward finds; reads alone are no obstacle."""
    torch.manual_seed(0)
    model = Blocks(way).train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    compare(tools, model, stock, torch.randn(6, WIDTH))
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    reasons = [site.reason or "" for site in report.sites if site.status == "unmatched"]
    assert bool(reasons) == (way != "read_after")
    # Of that one another form comes as far, in which the norm has no weight.
    assert any("is written to in place" in reason for reason in reasons) or way in (
        "read_after",
        "written_in_a_product",
    )


class Head(nn.Module):
    """Logits and their loss, after which something that was read is written to."""

    def __init__(self, written: str) -> None:
        super().__init__()
        self.linear, self.written = nn.Linear(WIDTH, CLASSES, bias=False), written

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.sin()
        logits = x if self.written == "what is no product" else self.linear(x)
        loss = F.cross_entropy(logits, labels)
        if self.written == "logits":
            logits.data.mul_(3)
        elif self.written == "items":
            logits.data[..., 0] = -100.0
        elif self.written == "detached":
            logits.detach().mul_(3)
        elif self.written == "what is no product":
            logits.data.mul_(3)
        elif self.written == "input":
            x.data.mul_(3)
        return loss, logits


@pytest.mark.parametrize("written", ["logits", "items", "detached", "input", "what is no product"])
def test_what_is_written_to_after_the_loss_is_not_what_gradients_read(written: str, tools: Any) -> None:
    torch.manual_seed(0)
    model = Head(written).train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    compare(tools, model, stock, torch.randn(6, WIDTH, requires_grad=True), torch.randint(WIDTH, (6,)))
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    (site,) = report.sites
    if written == "input":  # the loss reads the logits alone
        assert (site.status, site.op) == ("rewritten", "cross_entropy")
        return
    assert site.status == "unmatched"
    why = (
        "written to in place after the match" if written == "what is no product" else "linear is also read by"
    )
    assert why in (site.reason or "")
