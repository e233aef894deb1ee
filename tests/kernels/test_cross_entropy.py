"""cross_entropy: the kernels and the op against the reference."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fxopt.kernels.cross_entropy import cross_entropy, cross_entropy_reference, kernels, op
from fxopt.kernels.row_loss import Shaping

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "z_loss of every row": {"z_loss": 1e-2, "z_rows": "all"},
    "all": {"reduction": "sum", "scale": 0.5, "softcap": 5.0, "label_smoothing": 0.2, "z_loss": 1e-3},
    "all, z_loss of every row": {
        "scale": 0.5,
        "softcap": 5.0,
        "label_smoothing": 0.2,
        "z_loss": 1e-3,
        "z_rows": "all",
    },
}


def make(
    rows: int, classes: int, dtype: torch.dtype, device: str, ignored: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (torch.randn(rows, classes, device=device) * 2).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (rows,), device=device)
    labels[:ignored] = -100
    return logits, labels


def run_kernel(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    denominator: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    z_rows: str = "labelled",
) -> tuple[torch.Tensor, torch.Tensor]:
    shaping = Shaping(scale, softcap, label_smoothing, z_loss, z_rows == "all")
    with torch.no_grad():
        loss, lse, divisor = kernels.launch_forward(
            logits, labels, denominator, ignore_index, reduction == "mean", *shaping
        )
        dloss = torch.ones((), device=logits.device)
        return loss, kernels.launch_backward(dloss, logits, labels, lse, divisor, ignore_index, *shaping)


def compare(
    logits: torch.Tensor, labels: torch.Tensor, form: dict[str, Any], check: Any, gradients: Any
) -> None:
    def reference(logits: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return cross_entropy_reference(logits, labels, **form)

    exact_loss, (exact,) = gradients(reference, [logits], None, torch.float64)
    eager_loss, (eager,) = gradients(reference, [logits], None)
    loss, found = run_kernel(logits, labels, **form)
    check("loss", loss, eager_loss, exact_loss)
    check("logits", found, eager, exact)


@pytest.mark.parametrize("classes", [1, 63, 1000, 4096, 9001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(classes: int, dtype: torch.dtype, device: str, check: Any, gradients: Any) -> None:
    compare(*make(6, classes, dtype, device), {}, check, gradients)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forms(name: str, dtype: torch.dtype, device: str, check: Any, gradients: Any) -> None:
    compare(*make(6, 5003, dtype, device), FORMS[name], check, gradients)


def test_the_reference_is_torch() -> None:
    logits, labels = make(9, 40, torch.float64, "cpu")
    for smoothing in (0.0, 0.1):
        for reduction in ("mean", "sum"):
            ours = cross_entropy_reference(logits, labels, reduction=reduction, label_smoothing=smoothing)
            stock = F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=smoothing)
            torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_reference_of_z_loss_is_what_models_write(reduction: str) -> None:
    logits, labels = make(9, 40, torch.float64, "cpu", ignored=3)
    loss = F.cross_entropy(logits, labels, reduction=reduction)
    squares = logits.logsumexp(-1).square()
    of_all = cross_entropy_reference(logits, labels, reduction=reduction, z_loss=0.1, z_rows="all")
    torch.testing.assert_close(of_all, loss + 0.1 * squares.mean())
    labelled = squares[labels != -100]
    own = cross_entropy_reference(logits, labels, reduction=reduction, z_loss=0.1)
    torch.testing.assert_close(own, loss + 0.1 * (labelled.mean() if reduction == "mean" else labelled.sum()))


def test_a_denominator_may_be_a_number(op_device: str) -> None:
    logits, labels = make(6, 100, torch.float32, op_device)
    by_number = cross_entropy(logits, labels, reduction="sum", denominator=7)
    by_tensor = cross_entropy(logits, labels, reduction="sum", denominator=torch.tensor(7, device=op_device))
    assert torch.equal(by_number, by_tensor)


def test_denominator(device: str, check: Any, gradients: Any) -> None:
    form = {"denominator": torch.tensor(17, device=device), "reduction": "sum"}
    compare(*make(6, 100, torch.float32, device), form, check, gradients)


def test_another_ignore_index(device: str, check: Any, gradients: Any) -> None:
    logits, labels = make(6, 100, torch.float32, device, ignored=0)
    labels[3] = 7
    compare(logits, labels, {"ignore_index": 7}, check, gradients)


@pytest.mark.parametrize("layout", ["row_stride", "transposed", "expanded"])
def test_strides(layout: str, device: str, check: Any, gradients: Any) -> None:
    base = torch.randn(6, 200, device=device)
    logits = {
        "row_stride": base[:, :100],
        "transposed": torch.randn(100, 6, device=device).t(),
        "expanded": base[:1, :100].expand(6, 100),
    }[layout]
    labels = torch.randint(0, 100, (12,), device=device)[::2]
    compare(logits.detach().requires_grad_(), labels, {}, check, gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_row_ignored(reduction: str, device: str) -> None:
    logits, labels = make(4, 50, torch.float32, device, ignored=4)
    stock = F.cross_entropy(logits, labels, reduction=reduction)
    (stock_gradient,) = torch.autograd.grad(stock, [logits])
    loss, found = run_kernel(logits, labels, reduction=reduction)
    torch.testing.assert_close(loss, stock.detach(), equal_nan=True)
    if reduction == "sum":
        torch.testing.assert_close(found, stock_gradient)
    assert torch.equal(found.nan_to_num(), torch.zeros_like(found))


def test_no_rows(device: str) -> None:
    loss, found = run_kernel(*make(0, 50, torch.float32, device, ignored=0), reduction="sum")
    assert loss.item() == 0
    assert found.shape == (0, 50)


@pytest.mark.parametrize(
    "values",
    [
        [1e4, -1e4, 3e38, 0.0],
        [float("-inf"), 2.0, float("-inf"), 1.0],
        [float("-inf")] * 4,
        [float("inf"), 2.0, 1.0, 0.0],
        [float("nan"), 2.0, 1.0, 0.0],
        [-3e38] * 4,
    ],
    ids=str,
)
def test_extreme_logits(values: list[float], device: str) -> None:
    """The loss that torch gives, for a label at each value; the extremes stand before and after a tile's width."""
    row = torch.tensor(values, device=device)
    logits = torch.cat(
        [row, torch.full((kernels.BLOCK_COLUMNS,), float("-inf"), device=device), row[:2]]
    ).expand(4, -1)
    labels = torch.arange(4, device=device)
    for index in range(4):
        one = labels[index : index + 1]
        stock_logits = logits[:1].detach().clone().requires_grad_()
        stock = F.cross_entropy(stock_logits, one)
        loss, found = run_kernel(logits[:1], one)
        torch.testing.assert_close(loss, stock.detach(), equal_nan=True)
        (stock_gradient,) = torch.autograd.grad(stock, [stock_logits])
        if stock.isfinite():
            torch.testing.assert_close(found, stock_gradient)


def test_a_planted_nan_in_an_ignored_row_changes_nothing(device: str) -> None:
    logits, labels = make(5, 64, torch.float32, device)
    clean, clean_gradient = run_kernel(logits, labels)
    with torch.no_grad():
        logits[0] = float("nan")
    loss, found = run_kernel(logits, labels)
    assert torch.equal(loss, clean)
    assert torch.equal(found, clean_gradient)


@pytest.mark.parametrize("label", [64, -1, -2, 2**40])
def test_a_label_out_of_range_is_nan_in_the_loss_and_in_its_row(label: int, device: str) -> None:
    logits, labels = make(5, 64, torch.float32, device)
    _, clean = run_kernel(logits, labels)
    labels[2] = label
    loss, found = run_kernel(logits, labels)
    assert loss.isnan()
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("label", [64, -1])
def test_a_label_out_of_range_raises_on_a_cpu(label: int) -> None:
    logits, labels = make(5, 64, torch.float32, "cpu")
    labels[2] = label
    with pytest.raises(IndexError, match=rf"^cross_entropy: label {label} is out of bounds, .*\nmend"):
        cross_entropy(logits, labels)
    with pytest.raises(IndexError, match="out of bounds"):
        F.cross_entropy(logits, labels)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 63])
def test_ignored_labels_when_compiled(ignore_index: int, op_device: str) -> None:
    logits, labels = make(8, 64, torch.float32, op_device)
    labels[2:5] = ignore_index
    labels[0] = 5
    compiled = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    loss = compiled(logits, labels, ignore_index=ignore_index)
    stock = F.cross_entropy(logits, labels, ignore_index=ignore_index)
    torch.testing.assert_close(loss, stock)
    (found,) = torch.autograd.grad(loss, [logits])
    torch.testing.assert_close(found, torch.autograd.grad(stock, [logits])[0])


def test_backward_twice_leaves_logits_alone(op_device: str) -> None:
    logits, labels = make(5, 64, torch.float32, op_device)
    before = logits.detach().clone()
    loss = cross_entropy(logits, labels)
    first = torch.autograd.grad(loss, [logits], retain_graph=True)[0]
    second = torch.autograd.grad(loss, [logits])[0]
    assert torch.equal(first, second)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("name", FORMS)
def test_op(name: str, op_device: str, check: Any, gradients: Any) -> None:
    logits, labels = make(5, 64, torch.float32, op_device)
    reference = functools.partial(cross_entropy_reference, **FORMS[name])
    dloss = torch.tensor(-0.7, device=op_device)
    exact_loss, (exact,) = gradients(lambda logits: reference(logits, labels), [logits], dloss, torch.float64)
    eager_loss, (eager,) = gradients(lambda logits: reference(logits, labels), [logits], dloss)
    loss, (found,) = gradients(lambda logits: cross_entropy(logits, labels, **FORMS[name]), [logits], dloss)
    check("loss", loss, eager_loss, exact_loss)
    check("logits", found, eager, exact)


def test_opcheck(op_device: str, opcheck: Any) -> None:
    logits, labels = make(5, 64, torch.float32, op_device)
    shaping = Shaping()
    opcheck(op._forward_op, (logits, labels, None, -100, True, *shaping))
    with torch.no_grad():
        loss, lse, divisor = op._forward_op(logits, labels, None, -100, True, *shaping)
    arguments = (loss, logits.detach(), labels, lse, divisor, -100, *shaping)
    opcheck(op._backward_op, arguments)


def test_both_ops_stand_in_the_joint_graph(op_device: str, joint_targets: Any) -> None:
    logits, labels = make(5, 64, torch.float32, op_device)
    targets = joint_targets(cross_entropy, logits, labels)
    assert targets == ["fxopt.cross_entropy.default", "fxopt.cross_entropy_backward.default"]


def test_second_derivatives_are_refused(op_device: str) -> None:
    logits, labels = make(5, 64, torch.float32, op_device)
    (dlogits,) = torch.autograd.grad(cross_entropy(logits, labels), [logits], create_graph=True)
    with pytest.raises(RuntimeError, match="fxopt::cross_entropy: second derivatives are not implemented"):
        dlogits.sum().backward()


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"expected logits \[N, V\] and labels \[N\]"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="reduction, expected one of"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), reduction="none")


def test_offsets_beyond_31_bits(device: str, tmp_path: Path) -> None:
    """Rows 2^30 items apart in a file or memory never written: the third starts at 2^31."""
    size = 2**31 + 64
    if device == "cpu":
        base = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
    else:
        base = torch.zeros(size, dtype=torch.bfloat16, device=device)
    logits = base.as_strided((3, 64), (2**30, 1))
    logits.copy_(torch.randn(3, 64, device=device))
    labels = torch.tensor([1, 2, 3], device=device)
    loss, found = run_kernel(logits, labels)
    dense_loss, dense = run_kernel(logits.clone(memory_format=torch.contiguous_format), labels)
    assert torch.equal(loss, dense_loss)
    assert torch.equal(found, dense)
