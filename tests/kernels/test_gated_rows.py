"""glu_layers: the kernel against plain torch in float64, and the op against the ops that it stands for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from fxopt.kernels.activations import ACTIVATIONS
from fxopt.kernels.glu.form import Form as Unit
from fxopt.kernels.glu.op import forward_op
from fxopt.kernels.glu.reference import plain_forward
from fxopt.kernels.lora_linear import gated_forward
from fxopt.kernels.lora_linear.gated_rows import launch_gated_rows

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PLAIN = Unit("silu")
UNITS = [
    PLAIN,
    Unit("sigmoid_alpha", 1.702, 1.0, 1.0, 1.5, 1.0, 0.75),
    *(Unit(act) for act in ACTIVATIONS if act != "silu"),
]
SIZES = {
    "fp16": (150, 200, 16, FP16),
    "one row": (1, 63, 8, FP16),
    "fp32": (130, 300, 20, FP32),
    "bf16": (4096, 1000, 16, BF16),
}


@pytest.mark.parametrize(
    ("rows", "columns", "rank", "dtype", "unit"),
    [
        pytest.param(*size, unit, id=f"{name}-{unit.act}" + "-clamped" * (unit.gate_limit is not None))
        for (name, size), unit in itertools.product(SIZES.items(), UNITS)
    ],
)
def test_the_unit_and_its_narrow_products_by_one_kernel(
    rows: int, columns: int, rank: int, dtype: torch.dtype, unit: Unit, device: str, check: Any
) -> None:
    if device == "cpu" and dtype == BF16:
        pytest.skip(
            "Triton's interpreter multiplies the bits of bfloat16 tiles as integers; the GPU variant runs"
        )
    if device == "cuda" and dtype == FP32:
        pytest.skip("on a GPU products of fp32 tiles are TF32: the op runs the kernel in 16 bits only")
    torch.manual_seed(0)
    whole = [torch.randn(rows, columns + 8 * place, device=device).to(dtype) for place in (1, 2)]
    gate, up = (tensor[:, :columns] for tensor in whole)
    factor = (torch.randn(rank, columns, device=device) / 8).to(dtype).t()
    longer = torch.empty(rows, columns + 64, device=device, dtype=dtype)
    launch_gated_rows(gate, up, unit, factor, 0.5, longer)

    def expected(dtype: torch.dtype) -> list[torch.Tensor]:
        value = plain_forward(gate.to(dtype), up.to(dtype), *unit.astuple())
        return [value, 0.5 * (value @ factor.to(dtype))]

    found = [longer[:, :columns], longer[:, columns : columns + rank]]
    for name, value, stock, truth in zip(
        ("value", "products"), found, expected(dtype), expected(torch.float64), strict=True
    ):
        check(name, value, stock, truth)
    assert not longer[:, columns + rank :].any()
    if device == "cuda":
        assert torch.equal(longer[:, :columns], forward_op(gate, up, *unit.astuple())), "the unit's own bits"


def arguments(
    tokens: int, in_width: int, width: int, rank: int, dtype: torch.dtype, device: str
) -> list[Any]:
    """Return the op's arguments: a unit and a layer of a frozen weight with an adapter and a bias."""
    torch.manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype)

    gate, up = (made(2, tokens // 2, in_width) for _ in range(2))
    layer = [[made(width, in_width)], [made(width)], [made(rank, in_width)], [made(width, rank)]]
    return [gate, up, *PLAIN.astuple(), *layer, [None] * 4, [""], [width], [0], [0], [0.5], dtype]


def widened(given: Any) -> Any:
    wide = tree_map(lambda item: item.double() if isinstance(item, torch.Tensor) else item, given)
    return [*wide[:-1], torch.float64]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note each launch of the kernel."""
    done: list[int] = []
    run = gated_forward.launch_gated_rows
    monkeypatch.setattr(gated_forward, "launch_gated_rows", lambda *items: (done.append(1), run(*items))[1])
    return done


@pytest.mark.parametrize("is_one_product", [True, False])
def test_the_op_returns_what_both_ops_return(
    is_one_product: bool, device: str, check: Any, launched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated_forward, "_is_one_product", lambda call: is_one_product)
    monkeypatch.setattr(gated_forward, "writes_rows_once", lambda *items: True)
    given = arguments(130, 64, 96, 16, FP16, device)
    (found,), (eager,), (exact,) = (
        gated_forward._run_together(*given),
        gated_forward._run_apart(*given),
        gated_forward._run_apart(*widened(given)),
    )
    assert launched
    check("y", found, eager, exact)


def test_few_tokens_run_apart(op_device: str, launched: list[int]) -> None:
    given = arguments(10, 64, 96, 16, FP16, op_device)
    (found,), (apart,) = gated_forward._run_together(*given), gated_forward._run_apart(*given)
    assert torch.equal(found, apart)
    assert launched == []


def test_the_value_needs_no_memory_but_its_own_rows() -> None:
    given = arguments(8192, 18944, 3584, 16, BF16, "meta")
    assert gated_forward._workspace(*given) == 2 * 8192 * (18944 + 64), "a dense weight is read as it is"
    coded = [*given[:-6], ["nf4:64"], *given[-5:]]
    rows = 8192 + 3584
    assert gated_forward._workspace(*coded) == 2 * rows * (18944 + 64), "decoded beside B"
    few = arguments(64, 18944, 3584, 16, BF16, "meta")
    assert gated_forward._workspace(*few) == few[0].nbytes, "apart, the value is in memory"


def test_the_op_is_registered_as_torch_wants_it(op_device: str, opcheck: Any) -> None:
    opcheck(torch.ops.fxopt.glu_layers.default, tuple(arguments(6, 8, 12, 4, FP32, op_device)))


@pytest.mark.gpu
def test_a_wide_unit_is_written_once(check: Any, launched: list[int]) -> None:
    given = arguments(4096, 8192, 1024, 16, BF16, "cuda")
    (found,) = torch.ops.fxopt.glu_layers(*given)
    assert launched
    check("y", found, gated_forward._run_apart(*given)[0], gated_forward._run_apart(*widened(given))[0])
