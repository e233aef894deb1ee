"""linear_cross_entropy: the kernel and the op against the reference."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fxopt.kernels.linear_cross_entropy import (
    chunks,
    kernels,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    op,
)
from fxopt.kernels.linear_cross_entropy.labelled import Labelled
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
    rows: int,
    width: int,
    classes: int,
    dtype: torch.dtype,
    device: str,
    *,
    ignored: int = 2,
    bias: bool = True,
) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    h = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(classes, width, device=device) / width**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (rows,), device=device)
    labels[torch.randperm(rows, device=device)[:ignored]] = -100
    return [
        h,
        weight,
        torch.randn(classes, device=device).to(dtype).requires_grad_() if bias else None,
    ], labels


def run_kernel(
    inputs: list[torch.Tensor | None],
    labels: torch.Tensor,
    dloss: torch.Tensor,
    *,
    denominator: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    z_rows: str = "labelled",
    chunk_bytes: int = chunks.CHUNK_BYTES,
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    h, weight, bias = inputs
    assert h is not None
    assert weight is not None
    needs = [tensor is not None and tensor.requires_grad for tensor in inputs]
    with torch.no_grad():
        loss, divisor, *found = kernels.launch_forward(
            h,
            weight,
            labels,
            bias,
            denominator,
            ignore_index,
            reduction == "mean",
            *Shaping(scale, softcap, label_smoothing, z_loss, z_rows == "all"),
            chunk_bytes,
            *needs,
        )
        return loss, kernels.launch_backward(dloss, divisor, *found, h.dtype)


def compare(
    inputs: list[torch.Tensor | None],
    labels: torch.Tensor,
    form: dict[str, Any],
    check: Any,
    gradients: Any,
    chunk_bytes: int = chunks.CHUNK_BYTES,
) -> None:
    def reference(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear_cross_entropy_reference(h, weight, labels, bias, **form)

    dloss = torch.tensor(0.75, device=labels.device)
    exact_loss, exact = gradients(reference, inputs, dloss, torch.float64)
    eager_loss, eager = gradients(reference, inputs, dloss)
    loss, found = run_kernel(inputs, labels, dloss, chunk_bytes=chunk_bytes, **form)
    rounded_to = inputs[0].dtype  # type: ignore[union-attr]
    check("loss", loss, eager_loss, exact_loss, rounded_to)
    for name, value, eager_value, exact_value in zip(
        ("h", "weight", "bias"), found, eager, exact, strict=True
    ):
        check(name, value, eager_value, exact_value)


@pytest.mark.parametrize("classes", [1, 63, 1000, 4096, 9001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(classes: int, dtype: torch.dtype, device: str, check: Any, gradients: Any) -> None:
    compare(*make(9, 48, classes, dtype, device), {}, check, gradients)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forms(name: str, dtype: torch.dtype, device: str, check: Any, gradients: Any) -> None:
    compare(*make(9, 48, 513, dtype, device), FORMS[name], check, gradients)


def cases_of_chunks() -> list[Any]:
    """Return every chunk, dtype and number of ignored rows: one dtype of each pair where not exhaustive."""
    return [
        pytest.param(
            rows,
            dtype,
            ignored,
            marks=[pytest.mark.exhaustive] * ((at + dtype_at + ignored) % len(DTYPES) != 0),
        )
        for (at, rows), (dtype_at, dtype), ignored in itertools.product(
            enumerate((1, 3, 7)), enumerate(DTYPES), (0, 5)
        )
    ]


@pytest.mark.parametrize(("rows_per_chunk", "dtype", "ignored"), cases_of_chunks(), ids=str)
def test_chunks(
    rows_per_chunk: int, dtype: torch.dtype, ignored: int, device: str, check: Any, gradients: Any
) -> None:
    inputs, labels = make(20, 48, 200, dtype, device, ignored=ignored)
    chunk_bytes = rows_per_chunk * 200 * inputs[0].element_size()  # type: ignore[union-attr]
    compare(inputs, labels, {}, check, gradients, chunk_bytes)


@pytest.mark.parametrize("first_rows", [2, 100])
@pytest.mark.parametrize("ignored", [0, 5, 18, 20])
def test_rows_counted_after_the_first_chunk(
    ignored: int, first_rows: int, device: str, check: Any, gradients: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the host must not wait for their number; NaN in rows without a label changes nothing."""
    monkeypatch.setattr(Labelled, "is_counted", False)
    monkeypatch.setattr(chunks, "FIRST_ROWS", first_rows)
    inputs, labels = make(20, 48, 200, torch.float32, device, ignored=ignored)
    with torch.no_grad():
        inputs[0][labels == -100] = float("nan")  # type: ignore[index]
    one, chunk_bytes = torch.ones((), device=device), 7 * 208 * 4
    for frozen in (False, True):
        inputs[1].requires_grad_(not frozen)  # type: ignore[union-attr]
        loss, found = run_kernel(inputs, labels, one, chunk_bytes=chunk_bytes, reduction="sum")
        with monkeypatch.context() as patch:
            patch.setattr(Labelled, "is_counted", True)
            counted_loss, counted = run_kernel(inputs, labels, one, chunk_bytes=chunk_bytes, reduction="sum")
        torch.testing.assert_close(loss, counted_loss)
        assert (found[1] is None) == frozen
        for one_found, other in zip(found, counted, strict=True):
            torch.testing.assert_close(one_found, other)


@pytest.mark.parametrize("num_chunks", [2, chunks.MOST_ROUNDED_SUMS, chunks.MOST_ROUNDED_SUMS + 1])
def test_sums_over_chunks_are_as_exact_as_eager(
    num_chunks: int, op_device: str, check: Any, gradients: Any
) -> None:
    """The gradient of W in bf16 with rounded sums, at most twice eager's error, without a floor."""
    rows, classes = 32 * num_chunks, 64
    inputs, labels = make(rows, 64, classes, torch.bfloat16, op_device, ignored=0)

    def reference(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear_cross_entropy_reference(h, weight, labels, bias)

    one = torch.ones((), device=op_device)
    _, exact = gradients(reference, inputs, one, torch.float64)
    _, eager = gradients(reference, inputs, one)
    with torch.no_grad():  # in plain torch, whose roundings are those of a GPU
        out = op.plain_forward(
            inputs[0], inputs[1], labels, inputs[2], None, -100, True, *Shaping(), 32 * classes * 2,
            True, True, True,
        )  # fmt: skip
    error = (out[3].double() - exact[1]).norm()  # type: ignore[union-attr]
    assert error <= 2 * (eager[1].double() - exact[1]).norm()


def test_the_chunk_follows_the_budget() -> None:
    assert chunks.plan_chunk_rows(8192, 128256 * 2, 512 * 2**20) == 2048
    assert chunks.plan_chunk_rows(8192, 10, 512 * 2**20) == 8192
    assert chunks.plan_chunk_rows(10, 1000, 1) == 1
    assert chunks.plan_chunk_rows(0, 1000, 512 * 2**20) == 1
    for rows in (1, 100, 129, 5000, 8191):
        for most in (1, 100, 128, 300, 2093):
            chunk = chunks.plan_chunk_rows(rows, 4, 4 * most)
            assert 1 <= chunk <= max(1, min(rows, most))


@pytest.mark.parametrize(
    ("vocabulary", "frozen", "trained"), [(32_000, 8192, 8192), (256_000, 1024, 2048), (300_000, 768, 1664)]
)
def test_a_trained_head_has_fewer_chunks_where_its_rows_are_long(
    vocabulary: int, frozen: int, trained: int
) -> None:
    for rows, trains in ((frozen, False), (trained, True)):
        most = chunks.plan_chunk_bytes(vocabulary, 2, trains_weight=trains)
        assert most <= 2**30
        assert chunks.plan_chunk_rows(8192, 2 * vocabulary, most) == rows


@pytest.mark.parametrize("trains", [False, True])
def test_chunks_are_those_of_what_is_trained(
    trains: bool, op_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (h, weight, _), labels = make(9, 48, 100, torch.float32, op_device, ignored=0)
    weight.requires_grad_(trains)  # type: ignore[union-attr]
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 3 * 112 * 4)
    monkeypatch.setattr(chunks, "TRAINED_ROWS", 5)
    monkeypatch.setattr(chunks, "FIRST_ROWS", 3)
    taken: list[int] = []
    for module, name in ((op, "_plain_rows"), (kernels, "_launch_rows")):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda z, *rest, run=run: (taken.append(len(z)), run(z, *rest)))
    linear_cross_entropy(h, weight, labels)  # type: ignore[arg-type]
    assert taken == ([5, 4] if trains else [3, 3, 3])


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_only_the_gradients_needed(frozen: tuple[int, ...], device: str, check: Any, gradients: Any) -> None:
    inputs, labels = make(9, 48, 100, torch.float32, device)
    for index in frozen:
        inputs[index] = inputs[index].detach()  # type: ignore[union-attr]
    compare(inputs, labels, {}, check, gradients, 3 * 400)


def test_denominator(device: str, check: Any, gradients: Any) -> None:
    form = {"denominator": torch.tensor(17, device=device), "reduction": "sum"}
    compare(*make(9, 48, 100, torch.float32, device), form, check, gradients)


def test_strides(device: str, check: Any, gradients: Any) -> None:
    h = torch.randn(9, 96, device=device)[:, ::2].detach().requires_grad_()
    weight = torch.randn(48, 100, device=device).t().detach().requires_grad_()
    labels = torch.randint(0, 100, (18,), device=device)[::2]
    compare([h, weight, None], labels, {}, check, gradients, 4 * 400)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_row_ignored(reduction: str, device: str) -> None:
    inputs, labels = make(4, 48, 100, torch.float32, device, ignored=4)
    loss, found = run_kernel(inputs, labels, torch.ones((), device=device), reduction=reduction)
    assert loss.isnan() if reduction == "mean" else loss.item() == 0
    for value in found:
        assert value is not None
        assert torch.equal(value.nan_to_num(), torch.zeros_like(value))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_ignored_trains_nothing(reduction: str, dtype: torch.dtype, op_device: str) -> None:
    """As in stock: a mean is NaN, a sum 0, and the gradients are 0 either way."""
    (h, weight, bias), labels = make(4, 48, 100, dtype, op_device, ignored=4)
    stock = F.cross_entropy(F.linear(h, weight, bias).float(), labels, reduction=reduction)  # type: ignore[arg-type]
    loss = linear_cross_entropy(h, weight, labels, bias, reduction=reduction)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, stock, equal_nan=True)
    leaves = [h, weight, bias]
    for found, expected in zip(
        torch.autograd.grad(loss, leaves),  # type: ignore[arg-type]
        torch.autograd.grad(stock, leaves),  # type: ignore[arg-type]
        strict=True,
    ):
        assert torch.equal(expected, torch.zeros_like(expected))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("value", [1e4, -1e4, float("inf"), float("nan")])
def test_extreme_logits(value: float, device: str) -> None:
    """One logit of that size in each row: loss and gradients as stock's, NaN where they are."""
    inputs, labels = make(9, 48, 100, torch.float32, device, bias=False)
    h, weight = inputs[:2]
    assert h is not None
    assert weight is not None
    with torch.no_grad():
        h[:, 0], weight[:, 0] = 1.0, 0.0
        weight[7, 0] = value
    labels[:2] = torch.tensor([7, 8], device=device)
    stock = F.cross_entropy(F.linear(h, weight), labels)
    stock_gradients = torch.autograd.grad(stock, [h, weight])
    loss, found = run_kernel(inputs, labels, torch.ones((), device=device))
    torch.testing.assert_close(loss, stock.detach(), equal_nan=True)
    if stock.isfinite():
        for mine, expected in zip(found, stock_gradients, strict=False):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", [100, -1])
def test_a_label_out_of_range(label: int, device: str) -> None:
    """NaN in the loss and in the gradients from the kernel; the op raises on a CPU, as torch does."""
    inputs, labels = make(9, 48, 100, torch.float32, device, ignored=0)
    labels[4] = label
    loss, found = run_kernel(inputs, labels, torch.ones((), device=device))
    assert loss.isnan()
    assert found[0] is not None
    assert found[0][4].isnan().all()
    assert found[0][:4].isfinite().all()
    if device == "cpu":
        with pytest.raises(
            IndexError, match=rf"^linear_cross_entropy: label {label} is out of bounds, .*\nmend"
        ):
            linear_cross_entropy(inputs[0], inputs[1], labels)  # type: ignore[arg-type]


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 63])
def test_ignored_labels_when_compiled(ignore_index: int, op_device: str) -> None:
    (h, weight, _), labels = make(8, 48, 64, torch.float32, op_device, ignored=0)
    labels[2:5] = ignore_index
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    loss = compiled(h, weight, labels, ignore_index=ignore_index)
    stock = F.cross_entropy(F.linear(h, weight), labels, ignore_index=ignore_index)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, stock)
    for found, expected in zip(
        torch.autograd.grad(loss, [h, weight]),  # type: ignore[arg-type]
        torch.autograd.grad(stock, [h, weight]),  # type: ignore[arg-type]
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_offsets_beyond_31_bits(device: str, tmp_path: Path) -> None:
    """Rows 2^30 items apart in a file or memory never written: the third starts at 2^31."""
    size = 2**31 + 64
    if device == "cpu":
        base = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
    else:
        base = torch.zeros(size, dtype=torch.bfloat16, device=device)
    dense = torch.randn(3, 64, device=device).to(torch.bfloat16)
    far = base.as_strided((3, 64), (2**30, 1))
    far.copy_(dense)
    labels, one = torch.tensor([1, -100, 3], device=device), torch.ones((), device=device)
    losses = torch.zeros(2, 3, device=device)
    for row, logits in zip(losses, (far, dense), strict=True):
        kernels._launch_rows(logits, labels, row, one, None, -100, Shaping(), True)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(far, dense)


def test_no_rows(device: str) -> None:
    inputs, labels = make(0, 48, 100, torch.float32, device, ignored=0)
    loss, found = run_kernel(inputs, labels, torch.ones((), device=device), reduction="sum")
    assert loss.item() == 0
    assert found[0] is not None
    assert found[0].shape == (0, 48)
    assert found[1] is not None
    assert torch.equal(found[1], torch.zeros_like(found[1]))


def test_planted_nan_in_an_ignored_row_changes_nothing(device: str) -> None:
    inputs, labels = make(9, 48, 100, torch.float32, device)
    one = torch.ones((), device=device)
    clean, clean_found = run_kernel(inputs, labels, one)
    with torch.no_grad():
        inputs[0][labels == -100] = float("nan")  # type: ignore[index]
    loss, found = run_kernel(inputs, labels, one)
    assert torch.equal(loss, clean)
    assert all(torch.equal(a, b) for a, b in zip(found, clean_found, strict=True))  # type: ignore[arg-type]


def test_rows_ignored_inside_the_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a CUDA graph is captured: nothing is left out, the ignored rows get gradient 0."""
    inputs, labels = make(9, 48, 100, torch.float32, device)
    one = torch.ones((), device=device)
    loss, found = run_kernel(inputs, labels, one)
    monkeypatch.setattr(chunks, "find_labelled", lambda *_: None)
    whole_loss, whole_found = run_kernel(inputs, labels, one)
    torch.testing.assert_close(whole_loss, loss)
    for whole, part in zip(whole_found, found, strict=True):
        torch.testing.assert_close(whole, part)


def test_float16_keeps_small_and_large_gradients(device: str) -> None:
    """Many rows of one label, a large denominator, and a loss scale that comes in with backward."""
    rows, chunk_rows = (300, 64) if device == "cuda" else (60, 16)
    classes = 500
    h = torch.ones(rows, 8, device=device, dtype=torch.float16).requires_grad_()
    weight = torch.zeros(classes, 8, device=device, dtype=torch.float16).requires_grad_()
    labels = torch.zeros(rows, dtype=torch.long, device=device)
    loss_scale = torch.tensor(65536.0, device=device)
    denominator = torch.tensor(1e5, device=device)
    chunk_bytes = 2 * classes * chunk_rows
    _, found = run_kernel(
        [h, weight, None], labels, loss_scale, denominator=denominator, chunk_bytes=chunk_bytes
    )
    exact_weight = weight.detach().double().requires_grad_()
    exact = linear_cross_entropy_reference(h.detach().double(), exact_weight, labels, denominator=denominator)
    exact.backward(loss_scale.double())
    assert found[1] is not None
    torch.testing.assert_close(found[1].double(), exact_weight.grad, rtol=1e-2, atol=1e-4)


def test_backward_twice(op_device: str) -> None:
    (h, weight, _), labels = make(9, 48, 100, torch.float32, op_device)
    assert h is not None
    assert weight is not None
    loss = linear_cross_entropy(h, weight, labels)
    first = torch.autograd.grad(loss, [h, weight], retain_graph=True)
    doubled = torch.autograd.grad(2 * loss, [h, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [h, weight])
    for a, b, c in zip(first, doubled, second, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(2 * a, b)


def test_tied_weight(op_device: str) -> None:
    weight = torch.randn(100, 48, device=op_device).requires_grad_()
    labels = torch.randint(0, 100, (9,), device=op_device)
    found = torch.autograd.grad(linear_cross_entropy(weight[labels], weight, labels), [weight])[0]
    exact = torch.autograd.grad(linear_cross_entropy_reference(weight[labels], weight, labels), [weight])[0]
    torch.testing.assert_close(found, exact)


def test_no_grad_computes_no_gradient(op_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (h, weight, _), labels = make(9, 48, 100, torch.float32, op_device)
    products: list[Any] = []
    monkeypatch.setattr(chunks, "_add_product", lambda *args, **kwargs: products.append(args))
    with torch.no_grad():
        loss = linear_cross_entropy(h, weight, labels)  # type: ignore[arg-type]
    assert not loss.requires_grad
    assert products == []


@pytest.mark.parametrize("name", FORMS)
def test_op(name: str, op_device: str, check: Any, gradients: Any) -> None:
    inputs, labels = make(9, 48, 100, torch.float32, op_device)
    dloss = torch.tensor(-0.7, device=op_device)
    reference = functools.partial(linear_cross_entropy_reference, **FORMS[name])
    op = functools.partial(linear_cross_entropy, chunk_bytes=4 * 400, **FORMS[name])
    exact_loss, exact = gradients(lambda h, w, b: reference(h, w, labels, b), inputs, dloss, torch.float64)
    eager_loss, eager = gradients(lambda h, w, b: reference(h, w, labels, b), inputs, dloss)
    loss, found = gradients(lambda h, w, b: op(h, w, labels, b), inputs, dloss)
    check("loss", loss, eager_loss, exact_loss)
    for key, value, eager_value, exact_value in zip(
        ("h", "weight", "bias"), found, eager, exact, strict=True
    ):
        check(key, value, eager_value, exact_value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype, op_device: str, opcheck: Any) -> None:
    (h, weight, bias), labels = make(9, 48, 100, dtype, op_device)
    rest = (None, -100, True, *Shaping(), chunks.CHUNK_BYTES)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (h, weight, labels, bias, *rest, True, True, True)
    opcheck(op._forward_op, arguments, test_utils=utilities, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        loss, divisor, dh, dweight, dbias = op._forward_op(*arguments)
    opcheck(op._backward_op, (loss, divisor, dh, dweight, dbias, dtype))
    opcheck(op._backward_op, (loss, divisor, dh, None, None, dtype))


def test_both_ops_stand_in_the_joint_graph(op_device: str, joint_targets: Any) -> None:
    (h, weight, _), labels = make(9, 48, 100, torch.float32, op_device)
    targets = joint_targets(linear_cross_entropy, h, weight, labels)
    assert targets == ["fxopt.linear_cross_entropy.default", "fxopt.linear_cross_entropy_backward.default"]


@pytest.mark.parametrize("power", [1, 2])
def test_second_derivatives_are_refused(power: int, op_device: str) -> None:
    (h, weight, _), labels = make(9, 48, 100, torch.float32, op_device)
    loss = linear_cross_entropy(h, weight, labels) ** power  # type: ignore[arg-type]
    (dh,) = torch.autograd.grad(loss, [h], create_graph=True)
    with pytest.raises(RuntimeError, match="fxopt::linear_cross_entropy: second derivatives"):
        dh.sum().backward()


def test_errors() -> None:
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"expected h \[N, H\], weight \[V, H\] and labels \[N\]"):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 5), labels)
    with pytest.raises(ValueError, match="expected one dtype"):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3).double(), labels)


@pytest.mark.gpu
def test_a_chunk_of_more_than_2_to_the_31_logits() -> None:
    rows, classes = 17000, 128256
    inputs, labels = make(rows, 16, classes, torch.bfloat16, "cuda", bias=False)
    one = torch.ones((), device="cuda")
    loss, found = run_kernel(inputs, labels, one)
    whole_loss, whole = run_kernel(inputs, labels, one, chunk_bytes=2 * rows * classes)
    torch.testing.assert_close(whole_loss, loss)
    torch.testing.assert_close(whole[0], found[0])


@pytest.mark.gpu
def test_a_captured_cuda_graph_waits_for_nothing() -> None:
    (h, weight, _), labels = make(64, 48, 1000, torch.bfloat16, "cuda")
    eager_loss = linear_cross_entropy(h, weight, labels).detach()  # type: ignore[arg-type]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = linear_cross_entropy(h, weight, labels).detach()  # type: ignore[arg-type]
    graph.replay()
    torch.testing.assert_close(loss, eager_loss)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_real_head(dtype: torch.dtype, check: Any, gradients: Any) -> None:
    inputs, labels = make(1500, 512, 32001, dtype, "cuda", ignored=100, bias=False)
    compare(inputs, labels, {}, check, gradients, 300 * 32001 * 2)
    compare(inputs, labels, {}, check, gradients, 100 * 32001 * 2)
