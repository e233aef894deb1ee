"""Dropout behind a reshape with dims of one item drops what stock's does: both draw in the order of memory."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.capture.installation import find_installation


class Head(nn.Module):
    """Maps tokens to an image, as heads of vision models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the image with items dropped."""
        image = self.linear(x).transpose(1, 2).reshape(x.shape[0], -1, 4, 4)
        return F.dropout(F.interpolate(image, scale_factor=2, mode="bilinear"), 0.5, self.training)


@pytest.mark.parametrize("is_canonical", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_dropout_behind_a_reshape_drops_the_same_items(install, batch, is_canonical):
    torch.manual_seed(0)
    stock = Head()
    model = copy.deepcopy(stock)
    if is_canonical:
        fxopt.optimize(model, patterns=[])
    else:
        install(model)
    dropped, gradients = [], []
    for each in (model, stock):
        torch.manual_seed(7)
        output = each(torch.randn(batch, 16, 8))
        output.square().sum().backward()
        dropped.append(output == 0)
        gradients.append(each.linear.weight.grad)
    assert torch.equal(*dropped)
    torch.testing.assert_close(*gradients)
    installation = find_installation(model)
    assert installation is not None
    assert len(installation.ledger.captures) == 1
