"""Dropout that keeps bits: the same items as torch's own, bit for bit in value and gradient, on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt.kernels.lora_linear import dropped

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = ((1,), (63,), (5, 200), (3, 7, 41), (4096,))
INTERPRETED = (torch.float32, torch.float16)  # there bf16 is truncated, on a GPU rounded


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_torchs_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, op_device: str
) -> None:
    torch.manual_seed(0)
    x, dy = (torch.randn(shape, device=op_device).to(dtype) for _ in range(2))
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    for function in (lambda x: dropped.dropout(x, 0.3)[0], lambda x: F.dropout(x, 0.3)):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append((y.detach(), torch.autograd.grad(y, leaf, dy)[0]))
    (y, dx), (expected_y, expected_dx) = results
    assert y.equal(expected_y)
    assert dx.equal(expected_dx)


def test_what_is_computed_again_is_what_was(op_device: str) -> None:
    for dtype in DTYPES:
        torch.manual_seed(0)
        x = torch.randn(3, 7, 41, device=op_device).to(dtype)
        y, packed = dropped.dropout(x, 0.1)
        assert packed.dtype == torch.uint8
        assert packed.numel() == -(-x.numel() // 8)
        assert torch.ops.fxopt.dropout_output_0(x, packed, 0.1).equal(y)
        assert dropped.unpack_bits(packed, x.shape).equal(y != 0)


@pytest.mark.parametrize("shape", [(8,), (1,), (63,), (1000,), (3, 4099)])
def test_the_kernels_do_what_plain_torch_does(shape: tuple[int, ...], device: str) -> None:
    torch.manual_seed(0)
    kept = torch.rand(shape, device=device) > 0.4
    packed = dropped.launch_pack_bits(kept)
    assert packed.equal(dropped.pack_bits(kept))
    assert dropped.unpack_bits(packed, kept.shape).equal(kept)
    for dtype in INTERPRETED if device == "cpu" else DTYPES[:3]:
        x = torch.randn(shape, device=device).to(dtype)
        expected = (x.float() * kept * 1.25).to(dtype)
        assert dropped.launch_drop_items(x, packed, 1.25).equal(expected)


def test_the_op_keeps_its_contract(op_device: str, opcheck: Any) -> None:
    x = torch.randn(3, 50, device=op_device)
    _, packed = dropped.dropout(x, 0.5)
    opcheck(torch.ops.fxopt.dropout_output_0.default, (x, packed, 0.5))
    opcheck(torch.ops.fxopt.dropout_backward.default, (x, packed, 0.5))
    basics = ("test_schema", "test_faketensor")  # a second run draws other items
    opcheck(torch.ops.fxopt.dropout.default, (x, 0.5, None), test_utils=basics)


def test_draws_of_a_graph_keep_their_order_and_are_never_merged(op_device: str) -> None:
    def three(x: torch.Tensor) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        bits = None
        for _ in range(3):
            y, bits = dropped.dropout(x, 0.5, bits)
            found.append(y)
        return found

    untyped: Any = torch
    x = torch.randn(40, 50, device=op_device)
    torch.manual_seed(0)
    expected = [F.dropout(x, 0.5) for _ in range(3)]
    backend = "inductor" if op_device == "cuda" else "aot_eager_decomp_partition"
    torch.manual_seed(0)
    found = untyped.compile(three, backend=backend)(x.clone().requires_grad_())
    for y, wanted in zip(found, expected, strict=True):
        assert y.equal(wanted)
