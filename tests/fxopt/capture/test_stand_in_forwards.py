"""Forwards that stand in for a model's own for the length of a call, as trainers set them."""

from __future__ import annotations

from typing import Any

import torch


def test_a_forward_that_takes_no_use_cache_is_given_none(twins, install) -> None:
    model, stock = twins()
    install(model)
    ids, losses = torch.randint(1, 256, (2, 16)), []
    for each in (model, stock):
        own = each.forward

        def compute_loss(tokens: torch.Tensor, each: Any = each, own: Any = own) -> torch.Tensor:
            each.forward = own
            return each(input_ids=tokens, labels=tokens).loss

        each.forward = compute_loss
        losses.append(each(ids))
        losses[-1].backward()
    assert torch.equal(*losses)
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
