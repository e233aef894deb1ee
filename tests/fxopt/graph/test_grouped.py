"""Products of rows in groups: one canonical op for what torch and a library call so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fxopt.graph.snapshot import count_ops
from fxopt.graph.vocabulary import grouped_mm

ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)


def draw(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x, w = torch.randn(6, 8, dtype=dtype), torch.randn(3, 16, 8, dtype=dtype)
    return x.requires_grad_(), w.requires_grad_()


def test_torchs_product_in_bfloat16_is_canonical(capture, canonical) -> None:
    def function(x, w):
        return F.grouped_mm(x[:5], w.transpose(-2, -1), offs=ENDS).exp()

    assert count_ops(canonical(capture(function, *draw(torch.bfloat16))))["grouped_mm"] == 1


def test_the_librarys_loop_is_canonical(capture, canonical) -> None:
    pytest.importorskip("transformers.integrations.moe")

    def function(x, w):
        return torch.ops.transformers.grouped_mm_fallback(x[:5], w.transpose(-2, -1), ENDS).exp()

    assert count_ops(canonical(capture(function, *draw(torch.float32))))["grouped_mm"] == 1


def test_matrices_for_columns_stay(capture, canonical) -> None:
    def function(x, w):
        return F.grouped_mm(x.t(), w[0, :6], offs=torch.tensor([2, 6], dtype=torch.int32)).exp()

    gm = canonical(capture(function, *draw(torch.bfloat16)))
    assert all(node.target is not grouped_mm for node in gm.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_the_library_the_product_is_the_same(monkeypatch, dtype) -> None:
    x, w = draw(dtype)
    w = w.detach().mT.requires_grad_()
    expected = torch.cat([x[:2] @ w[0], x[2:5] @ w[2]])
    dy = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [x, w], dy)
    monkeypatch.setattr("fxopt.graph.vocabulary.LOOP_OVER_GROUPS", "nobody::has_it")
    found = grouped_mm(x, w, ENDS)[:5]
    torch.testing.assert_close(found, expected)
    for value, other in zip(torch.autograd.grad(found, [x, w], dy), wanted, strict=True):
        torch.testing.assert_close(value, other)
