"""A loss that is computed outside the model, as Trainer does with label smoothing: the report says what that costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

IDS = torch.randint(1, 256, (2, 16), generator=torch.Generator().manual_seed(0))


def notes_of(installation):
    return [note for note in installation.ledger.notes if "and no loss" in note]


def test_scores_without_a_loss_are_noted_and_a_loss_inside_is_not(build, install):
    for given in ({"labels": IDS}, {}):
        model = build()
        installation = install(model)
        output = model(input_ids=IDS, **given)
        loss = output.loss if given else F.cross_entropy(output.logits.flatten(0, 1), IDS.flatten())
        loss.backward()
        found = notes_of(installation)
        assert found == [] if given else "scores of 256 classes" in found[0]


class Plain(nn.Module):
    """A table, three blocks, and what `head` makes of their result."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.head = head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Capped(nn.Linear):
    """Scores that are limited, as some models limit theirs."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 30 * torch.tanh(super().forward(input).float() / 30)


@pytest.mark.parametrize(
    ("head", "is_noted"),
    [(Capped(8, 256), True), (nn.Linear(8, 4), False), (nn.Identity(), False)],
    ids=["capped scores", "a few classes", "hidden states"],
)
def test_scores_are_told_by_their_number_and_projection(install, head, is_noted):
    model = Plain(head).train()
    installation = install(model)
    model(IDS).square().mean().backward()
    assert bool(notes_of(installation)) == is_noted


class Ends(nn.Module):
    """Two scores a token, as a head of answers has them: the tokens are the last dimension of each result."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[..., 0], x[..., 1]


def test_results_whose_last_size_changes_are_no_scores(install):
    model = Plain(Ends()).train()
    installation = install(model)
    for length in (16, 12, 20):
        start, end = model(IDS[:, :1].expand(2, length))
        (start.square().mean() + end.mean()).backward()
    assert notes_of(installation) == []
    assert installation.ledger.fallbacks == {}
