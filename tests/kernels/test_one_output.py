"""lora_linear_output: one layer's result alone is what all layers together gave, to the bit on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxopt.kernels.lora_linear import extended
from fxopt.kernels.lora_linear.one_output import arguments_of, output_flops, output_launches, output_moved

BF16, FP32 = torch.bfloat16, torch.float32
WIDTHS = (24, 16, 8)
ADAPTERS = {
    "one each": ((0, 4, 2.0), (1, 4, 0.5), (2, 6, 1.0)),
    "two of one layer": ((0, 4, 2.0), (0, 6, 0.25), (2, 8, 1.0)),
    "full rows": ((0, 16, 2.0), (1, 32, 0.3), (2, 16, 1.0)),
}


def arguments(adapters: Any, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Return the arguments of lora_linear for layers that share x."""
    torch.manual_seed(0)

    def make(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(of)

    weights, biases = [make(width, 64) for width in WIDTHS], [make(WIDTHS[0]), None, make(WIDTHS[2])]
    a = make(sum(rank for _, rank, _ in adapters), 64, of=adapter_dtype)
    b = [make(WIDTHS[owner], rank, of=adapter_dtype) for owner, rank, _ in adapters]
    owners, scales = [owner for owner, *_ in adapters], [scale for *_, scale in adapters]
    dense = ([None] * 12, [""] * 3, list(WIDTHS))
    return ([make(3, 7, 64)], weights, biases, [a], b, *dense, [0] * len(b), owners, scales, dtype)


@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32)], ids=["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("longer", [True, False])
def test_one_layers_result(
    adapters: Any, dtypes: Any, longer: bool, op_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if longer:
        monkeypatch.setattr(extended, "is_extensible", lambda x: True)
    monkeypatch.setattr(extended, "moves_less", lambda copied, added: longer)
    given = arguments(adapters, *dtypes, op_device)
    results = torch.ops.fxopt.lora_linear(*given)
    exact = op_device == "cpu" and not longer
    for place, result in enumerate(results):
        found = arguments_of(place, *given)
        assert found is not None
        alone = torch.ops.fxopt.lora_linear_output(*found)
        assert (alone.shape, alone.dtype) == (result.shape, result.dtype)
        error = (alone.float() - result.float()).norm() / result.float().norm()
        assert error <= (0 if exact else 2 * torch.finfo(dtypes[0]).eps)


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32)], ids=["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("longer", [True, False])
@pytest.mark.parametrize("place", [0, 1])
def test_only_the_rows_that_are_not_known_are_computed(
    place: int, dtypes: Any, longer: bool, op_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extended, "is_extensible", lambda x: longer)
    monkeypatch.setattr(extended, "moves_less", lambda copied, added: longer)
    found = arguments_of(place, *arguments(ADAPTERS["one each"], *dtypes, op_device))
    assert found is not None
    whole = torch.ops.fxopt.lora_linear_output(*found)
    known = torch.randn(5, WIDTHS[place], device=op_device).to(whole.dtype)
    result = torch.ops.fxopt.lora_linear_output(*found, known=known)
    assert (result.shape, result.dtype) == (whole.shape, whole.dtype)
    rows, expected = result.flatten(0, 1), whole.flatten(0, 1)
    assert torch.equal(rows[:5], known)
    error = (rows[5:].float() - expected[5:].float()).norm() / expected[5:].float().norm()
    assert error <= 2 * torch.finfo(dtypes[0]).eps


def test_it_counts_and_reads_one_layer() -> None:
    given = arguments(ADAPTERS["one each"], FP32, FP32, "cpu")
    found = arguments_of(1, *given)
    assert found is not None
    assert [weight is given[1][1] for weight in found[1]] == [True]
    assert output_flops(*found) == 2 * 21 * (64 * 16 + 4 * 64 + 16 * 4)
    known = torch.empty(5, 16)
    assert output_flops(*found, known=known) == 2 * 16 * (64 * 16 + 4 * 64 + 16 * 4)
    few = ([found[0][0].flatten(0, 1)[5:]], *found[1:])
    assert output_moved(*few) < output_moved(*found)
    assert output_moved(*found, known=known) == output_moved(*few) + 2 * known.nbytes
    assert output_launches(*found, known=known) == output_launches(*found) + 1


def test_a_layer_with_an_input_of_its_own_or_adapters_apart_is_not_computed_alone() -> None:
    given = list(arguments(((0, 4, 2.0), (1, 4, 0.5), (0, 4, 1.0)), FP32, FP32, "cpu"))
    assert arguments_of(0, *given) is None
    assert arguments_of(1, *given) is not None
    given[8] = [0, 0, 1]
    given[9] = [0, 1, 1]
    assert arguments_of(1, *given) is None


def test_the_op_is_registered_as_torch_wants_it(op_device: str, opcheck: Any) -> None:
    found = arguments_of(1, *arguments(ADAPTERS["one each"], FP32, FP32, op_device))
    opcheck(torch.ops.fxopt.lora_linear_output.default, found)
    known = torch.randn(5, WIDTHS[1], device=op_device)
    opcheck(torch.ops.fxopt.lora_linear_output.default, found, kwargs={"known": known})
