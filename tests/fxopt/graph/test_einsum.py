"""Einsums of two tensors: the products that they are, and those that stay einsums."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fxopt.graph.canonicalize import canonicalize
from fxopt.graph.snapshot import count_ops

PRODUCTS = {
    "btd, fd -> btf": ["linear"],
    "btd,df->btf": ["matmul"],
    "bqhd,bkhd->bhqk": ["transpose", "transpose", "transpose", "matmul"],
    "bhqk,bkhd->bqhd": ["transpose", "matmul", "transpose"],
    "nd,ndf->nf": ["unsqueeze", "matmul", "squeeze"],
    "nd,nfd->nf": ["unsqueeze", "matmul", "squeeze"],
    "nkd,nk->nd": ["transpose", "unsqueeze", "matmul", "squeeze"],
    "td,edf->etf": ["einsum"],
    "bij,bij->b": ["einsum"],
    "bi,bi->bi": ["einsum"],
}
SIZES = dict(b=2, h=3, q=4, k=5, d=6, n=4, f=3, e=2, t=5, i=3, j=4)


@pytest.mark.parametrize("equation", PRODUCTS)
def test_an_einsum_is_the_product_that_it_is(equation, capture) -> None:
    """Torch's einsum flattens rows before it multiplies, so a sum may be taken in another order."""
    parts = equation.replace(" ", "").partition("->")[0].split(",")
    inputs = [torch.randn([SIZES[each] for each in part], requires_grad=True) for part in parts]
    gm, given = capture(lambda *args: (torch.einsum(equation, *args),), *inputs)
    canonicalize(gm)
    assert count_ops(gm) == Counter(PRODUCTS[equation])
    (found,), expected = gm(*given), torch.einsum(equation, *inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("equation", "first"), [("td,ed->te", (3, 1)), ("bqd,bkd->bqk", (2, 3, 1))])
def test_a_summed_dim_that_is_repeated_stays_an_einsum(equation, first, capture) -> None:
    a, b = torch.randn(first, requires_grad=True), torch.randn(*first[:-2], 4, 5)
    gm, given = capture(lambda *args: (torch.einsum(equation, *args),), a, b)
    canonicalize(gm)
    assert count_ops(gm) == Counter(["einsum"])
    torch.testing.assert_close(gm(*given)[0], torch.einsum(equation, a, b))


def test_what_stands_before_a_product_has_its_dtype_and_gradient(capture) -> None:
    def function(a, b):
        with torch.no_grad():
            quiet = torch.einsum("bqhd,bkhd->bhqk", a, b)
        with torch.autocast("cpu", torch.bfloat16):
            return quiet, torch.einsum("bqhd,bkhd->bhqk", a, b)

    gm, given = capture(function, *(torch.randn(2, 4, 3, 6, requires_grad=True) for _ in range(2)))
    canonicalize(gm)
    products = [node for node in gm.graph.nodes if "matmul" in str(node.target)]
    values = [node.meta["example_value"] for node in products]
    assert [(value.dtype, value.requires_grad) for value in values] == [
        (torch.float32, False),
        (torch.bfloat16, True),
    ]
    assert [value.dtype for value in gm(*given)] == [torch.float32, torch.bfloat16]
