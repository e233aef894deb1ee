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
    """Maps tokens to an image, as heads of vision models do, through `within`, and drops items of it."""

    def __init__(self, within: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.within = within

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the image with items dropped."""
        channels = self.linear(x).transpose(1, 2)
        if self.within == "norm":
            channels = self.norm(channels)
        elif (
            self.within == "logsigmoid"
        ):  # its stand-in keeps the strides of what it is given, its kernel does not
            channels = F.logsigmoid(channels)
        elif self.within == "bytes":
            channels = channels * (channels.detach().view(torch.int32) >= 0)
        image = channels.reshape(x.shape[0], -1, 4, 4)
        return F.dropout(F.interpolate(image, scale_factor=2, mode="bilinear"), 0.5, self.training)


@pytest.mark.parametrize("is_canonical", [False, True])
@pytest.mark.parametrize(
    ("within", "batch"), [("", 1), ("", 2), ("norm", 1), ("logsigmoid", 1), ("bytes", 1)]
)
def test_dropout_behind_a_reshape_drops_the_same_items(install, within, batch, is_canonical):
    torch.manual_seed(0)
    stock = Head(within)
    model = copy.deepcopy(stock)
    if is_canonical:
        fxopt.optimize(model, patterns=[])
    else:
        install(model)
    outputs, gradients = [], []
    for each in (model, stock):
        torch.manual_seed(7)
        x = torch.randn(batch, 16, 8, requires_grad=True)
        output = each(x)
        (output.square().mean() + output.mean()).backward()
        outputs.append(output)
        gradients.append([x.grad, *(p.grad for p in each.linear.parameters())])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)
    installation = find_installation(model)
    assert installation is not None
    assert len(installation.ledger.captures) == 1
