"""glu_layers_backward: the kernel against plain torch in float64, and the op against the ops that it stands for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from fxopt.kernels.activations import ACTIVATIONS
from fxopt.kernels.glu.form import Form as Unit
from fxopt.kernels.glu.reference import plain_backward, plain_forward
from fxopt.kernels.lora_linear import gated, gated_products
from fxopt.kernels.lora_linear.gated_products import Narrow, launch_gated_products

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PLAIN, CLAMPED = Unit("silu"), Unit("sigmoid_alpha", 1.702, 1.0, 1.0, 1.5, 1.0, 0.75)
UNITS = [PLAIN, CLAMPED, *(Unit(act) for act in ACTIVATIONS if act != "silu")]


def tensors(rows: int, columns: int, ranks: tuple[int, int, int], dtype: torch.dtype, device: str) -> Any:
    """Return dy, gate and up, of other row strides, and factors and left sides of the three pairs of products."""
    torch.manual_seed(0)
    whole = [torch.randn(rows, columns + 8 * place, device=device).to(dtype) for place in range(3)]
    of_unit = torch.randn(ranks[0], columns, device=device).to(dtype).t() / 8
    factors = [of_unit, *(torch.randn(columns, rank, device=device).to(dtype) / 8 for rank in ranks[1:])]
    left = torch.randn(rows, sum(ranks), device=device).to(dtype) / 8
    return [tensor[:, :columns] for tensor in whole], factors, list(left.split(list(ranks), 1))


def expected(given: Any, unit: Unit, scales: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return dgate, dup, the products over columns and those over rows, computed in `dtype`."""
    (dy, gate, up), factors, lefts = ([tensor.to(dtype) for tensor in part] for part in given)
    attributes = unit.astuple()
    dgate, dup = plain_backward(dy, gate, up, *attributes, True, True)
    assert dgate is not None
    assert dup is not None
    matrices = [plain_forward(gate, up, *attributes), dgate, dup]
    narrow = list(zip(matrices, factors, lefts, scales, strict=True))
    outer = [scale * (matrix @ factor) for matrix, factor, _, scale in narrow]
    return [dgate, dup, *outer, *(scale * (matrix.t() @ left) for matrix, _, left, scale in narrow)]


def cases_of_units() -> list[Any]:
    """Return every size and unit; in fp32 only what is plain and what is clamped where not exhaustive."""
    sizes = {
        "fp16": (150, 200, (16, 16, 16), FP16),
        "one row": (1, 63, (8, 16, 32), FP16),
        "fp32": (130, 300, (4, 16, 20), FP32),
        "bf16": (4096, 1000, (16, 16, 16), BF16),
    }
    return [
        pytest.param(
            *size,
            unit,
            id=f"{name}-{unit.act}" + "-clamped" * (unit.gate_limit is not None),
            marks=[pytest.mark.exhaustive] * (name == "fp32" and unit not in (PLAIN, CLAMPED)),
        )
        for (name, size), unit in itertools.product(sizes.items(), UNITS)
    ]


@pytest.mark.parametrize(("rows", "columns", "ranks", "dtype", "unit"), cases_of_units())
def test_gradients_and_narrow_products_by_one_kernel(
    rows: int,
    columns: int,
    ranks: tuple[int, int, int],
    dtype: torch.dtype,
    unit: Unit,
    device: str,
    check: Any,
) -> None:
    if device == "cpu" and dtype == BF16:
        pytest.skip(
            "Triton's interpreter multiplies the bits of bfloat16 tiles as integers; the GPU variant runs"
        )
    if device == "cuda" and dtype == FP32:
        pytest.skip("on a GPU products of fp32 tiles are TF32: the op runs the kernel in 16 bits only")
    given = tensors(rows, columns, ranks, dtype, device)
    scales = (1.0, 0.5, 2.0)
    outs = [torch.empty(rows, rank + 5, device=device, dtype=dtype)[:, 2 : 2 + rank] for rank in ranks]
    narrow = [Narrow(*item) for item in zip(given[1], given[2], outs, scales, strict=True)]
    dgate, dup, sums = launch_gated_products(*given[0], unit, narrow)
    names = ("dgate", "dup", "h F", "dgate F", "dup F", "h^T L", "dgate^T L", "dup^T L")
    exact = expected(given, unit, scales, torch.float64)
    eager = expected(given, unit, scales, dtype)
    for name, value, stock, truth in zip(names, [dgate, dup, *outs, *sums], eager, exact, strict=True):
        check(name, value, stock, truth)


def arguments(
    tokens: int, in_width: int, width: int, ranks: tuple[int, int, int], dtype: torch.dtype, device: str
) -> list[Any]:
    """Return the op's arguments: a feed-forward part of frozen weights with an adapter at each."""
    torch.manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype)

    after_rank, gate_rank, up_rank = ranks
    dy, gate, up = (made(2, tokens // 2, width) for _ in range(3))
    dys, x = [made(2, tokens // 2, in_width)], made(2, tokens // 2, in_width)
    after_a, after_b = made(after_rank, width), made(in_width, after_rank)
    after = [dys, [made(in_width, width)], [None], [after_a], [after_b]]
    after += [[None] * 4, [""], [in_width], [0], [0], [0.5], [False, False, False, True, True]]
    before_b = [made(width, gate_rank), made(width, up_rank)]
    before = [[x], [made(width, in_width), made(width, in_width)], [None] * 2]
    before += [
        [made(gate_rank + up_rank, in_width)],
        before_b,
        [None] * 8,
        [""] * 2,
        [width] * 2,
        [0, 0],
        [0, 1],
    ]
    before += [[2.0, 0.25], [True, *[False] * 4, True, True, True]]
    return [dy, gate, up, *PLAIN.astuple(), True, True, *after, *before]


def widened(given: Any) -> Any:
    return tree_map(lambda item: item.double() if isinstance(item, torch.Tensor) else item, given)


@pytest.mark.parametrize("ranks", [(16, 16, 16), (8, 32, 16)])
def test_the_op_returns_what_the_three_ops_return(
    ranks: tuple[int, int, int], device: str, check: Any, monkeypatch: Any
) -> None:
    launched: list[int] = []
    run = gated_products.launch_gated_products
    monkeypatch.setattr(gated, "launch_gated_products", lambda *items: (launched.append(1), run(*items))[1])
    monkeypatch.setattr(gated, "reads_gated_once", lambda *items: True)
    given = arguments(130, 64, 96, ranks, FP16, device)
    found, eager, exact = (
        gated._run_together(*given),
        gated._run_apart(*given),
        gated._run_apart(*widened(given)),
    )
    assert launched
    assert len(found) == 2 + 1 + 1 + 2
    for place, (value, stock, truth) in enumerate(zip(found, eager, exact, strict=True)):
        check(f"value {place}", value, stock, truth)


@pytest.mark.parametrize("written", ["unit", "dy"])
def test_gradients_are_written_over_what_the_kernel_has_read(
    written: str, device: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(gated, "reads_gated_once", lambda *items: True)
    given = arguments(130, 64, 96, (16, 16, 16), FP16, device)
    before = [tensor.clone() for tensor in given[:3]]
    found = gated._run_together(*given)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given[:3], before, strict=True))
    over = gated._run_over(written, *given)
    changed = [not torch.equal(tensor, copy) for tensor, copy in zip(given[:3], before, strict=True)]
    assert changed == ([False, True, True] if written == "unit" else [True, False, False])
    for place, (value, other) in enumerate(zip(over, found, strict=True)):
        assert torch.equal(value, other), place


@pytest.mark.parametrize("rank", [16, 64])
def test_memory_is_spared_only_where_one_kernel_does_all(rank: int) -> None:
    given = arguments(8192, 3584, 18944, (rank, rank, rank), BF16, "meta")
    wide = given[1].nbytes
    plain, over_unit, over_dy = (
        workspace(*given)
        for workspace in (gated._workspace, gated._workspace_over_unit, gated._workspace_over_dy)
    )
    assert (plain - over_unit, plain - over_dy) == ((2 * wide, wide) if rank == 16 else (0, 0))
    assert plain >= (2 if rank == 16 else 3) * wide


def as_float(factors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [factor.float() for factor in factors]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(dict.fromkeys(("after_a", "after_b"), as_float), id="an adapter of another dtype"),
        pytest.param({"before_owners": lambda _: [1, 0]}, id="adapters in another order"),
        pytest.param({"before_needs": lambda needs: [*needs[:-1], False]}, id="a frozen adapter"),
        pytest.param({"after_needs": lambda needs: [needs[0], True, *needs[2:]]}, id="a trained layer"),
        pytest.param({}, id="few tokens"),
    ],
)
def test_what_the_kernel_cannot_do_runs_apart(
    change: dict[str, Any], op_device: str, monkeypatch: Any
) -> None:
    def launch_gated_products(*_: Any) -> Any:
        raise AssertionError("launched")

    monkeypatch.setattr(gated, "launch_gated_products", launch_gated_products)
    if change:
        monkeypatch.setattr(gated, "reads_gated_once", lambda *items: True)
    names = [argument.name for argument in torch.ops.fxopt.glu_layers_backward.default._schema.arguments]
    given = dict(zip(names, arguments(10, 64, 96, (16, 16, 16), FP16, op_device), strict=True))
    given |= {name: make(given[name]) for name, make in change.items()}
    found, apart = gated._run_together(*given.values()), gated._run_apart(*given.values())
    assert all(torch.equal(value, other) for value, other in zip(found, apart, strict=True))


def test_the_op_is_registered_as_torch_wants_it(op_device: str, opcheck: Any) -> None:
    for name in ("", "_over_unit", "_over_dy"):
        op = getattr(torch.ops.fxopt, f"glu_layers_backward{name}").default
        opcheck(op, tuple(arguments(6, 8, 12, (4, 4, 4), FP32, op_device)))


@pytest.mark.gpu
def test_a_wide_unit_is_read_once(check: Any, monkeypatch: Any) -> None:
    launched: list[int] = []
    run = gated_products.launch_gated_products
    monkeypatch.setattr(gated, "launch_gated_products", lambda *items: (launched.append(1), run(*items))[1])
    given = arguments(4096, 256, 8192, (16, 16, 16), BF16, "cuda")
    found = torch.ops.fxopt.glu_layers_backward(*given)
    assert launched
    for place, (value, stock, truth) in enumerate(
        zip(found, gated._run_apart(*given), gated._run_apart(*widened(given)), strict=True)
    ):
        check(f"value {place}", value, stock, truth)
