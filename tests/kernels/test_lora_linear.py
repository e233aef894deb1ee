"""lora_linear: the op against plain torch in float64, for one layer and for several that share their input."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fxopt.kernels.dequantize_4bit import dequantize_4bit
from fxopt.kernels.lora_linear import (
    backward,
    extend,
    extended,
    forward,
    lora_linear,
    lora_linear_reference,
    one_read,
    op,
    products,
)
from fxopt.kernels.lora_linear.form import Form, Weight

BF16, FP32 = torch.bfloat16, torch.float32


@dataclasses.dataclass
class Layers:
    """Layers that share x: `widths` of their results, and per adapter its layer, rank, factor and own input or not."""

    widths: tuple[int, ...]
    adapters: tuple[tuple[int, int, float, bool], ...]
    dtype: torch.dtype = FP32
    adapter_dtype: torch.dtype = FP32
    out_dtype: torch.dtype | None = None
    biases: bool = True
    in_width: int = 40

    def tensors(self, device: str, *, tokens: tuple[int, ...] = (3, 7)) -> list[torch.Tensor]:
        """Return x, the adapters' own input, weights, biases, A and B."""
        torch.manual_seed(0)
        scale = self.in_width**-0.5
        shapes = [
            ((*tokens, self.in_width), self.dtype, 1.0),
            ((*tokens, self.in_width), self.adapter_dtype, 1.0),
        ]
        shapes += [((width, self.in_width), self.dtype, scale) for width in self.widths]
        shapes += [((width,), self.dtype, 1.0) for width in self.widths if self.biases]
        shapes += [((rank, self.in_width), self.adapter_dtype, scale) for _, rank, _, _ in self.adapters]
        shapes += [
            ((self.widths[layer], rank), self.adapter_dtype, 0.5) for layer, rank, _, _ in self.adapters
        ]
        return [
            (torch.randn(shape, device=device) * size).to(dtype).requires_grad_()
            for shape, dtype, size in shapes
        ]

    def split(self, tensors: list[torch.Tensor]) -> tuple[Any, ...]:
        x, own, *rest = tensors
        n, count = len(self.widths), len(self.adapters)
        weights, rest = rest[:n], rest[n:]
        biases, rest = (rest[:n], rest[n:]) if self.biases else ([None] * n, rest)
        inputs = [own if is_own else None for *_, is_own in self.adapters]
        return x, weights, biases, inputs, rest[:count], rest[count:]

    def run(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wide = tensors[0].dtype == torch.float64
        return lora_linear(
            *self.split(list(tensors)),
            owners=[layer for layer, *_ in self.adapters],
            scales=[scale for _, _, scale, _ in self.adapters],
            out_dtype=None if wide else self.out_dtype,
        )

    def reference(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weights, biases, inputs, a, b = self.split(list(tensors))
        results: list[torch.Tensor] = []
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            own = [
                (x if source is None else source, first, second, scale)
                for (layer, _, scale, _), source, first, second in zip(
                    self.adapters, inputs, a, b, strict=True
                )
                if layer == index
            ]
            y = lora_linear_reference(x, weight, bias, own)
            results.append(y if x.dtype == torch.float64 or self.out_dtype is None else y.to(self.out_dtype))
        return tuple(results)


def gradients(
    function: Any, tensors: list[torch.Tensor], dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Return all results and all gradients."""
    leaves = [(t.detach() if dtype is None else t.detach().to(dtype)).requires_grad_() for t in tensors]
    results = function(*leaves)
    torch.manual_seed(1)
    seeds = [torch.randn(y.shape, device=y.device).to(y.dtype) for y in results]
    found = torch.autograd.grad(results, leaves, seeds, allow_unused=True)
    return [*results, *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True))]


FORMS = {
    "one": Layers((24,), ((0, 4, 2.0, False),)),
    "one, no bias": Layers((24,), ((0, 8, 1.0, False),), biases=False),
    "q, k, v": Layers((24, 16, 16), ((0, 4, 2.0, False), (1, 4, 0.5, False), (2, 6, 1.0, False))),
    "two adapters": Layers((24,), ((0, 4, 2.0, False), (0, 6, 0.25, False))),
    "an own input": Layers((24, 16), ((1, 4, 2.0, True), (0, 4, 0.5, False), (0, 3, 1.0, True))),
    "own inputs only": Layers((24,), ((0, 4, 2.0, True),)),
    "wide": Layers((1000,), ((0, 16, 1.0, False),), in_width=1000),
    "rank one": Layers((1,), ((0, 1, 1.0, False),), in_width=1),
}
DTYPES = {
    "fp32": {},
    "bf16": {"dtype": BF16, "adapter_dtype": BF16},
    "fp16": {"dtype": torch.float16, "adapter_dtype": torch.float16},
    "fp32 adapters": {"dtype": BF16},
    "fp32 results": {"dtype": BF16, "adapter_dtype": BF16, "out_dtype": FP32},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_results_and_gradients(form: str, dtypes: str, op_device: str, check: Any) -> None:
    layers = dataclasses.replace(FORMS[form], **DTYPES[dtypes])
    tensors = layers.tensors(op_device)
    exact = gradients(layers.reference, tensors, torch.float64)
    eager = gradients(layers.reference, tensors)
    ours = gradients(layers.run, tensors)
    for place, (value, stock, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        assert value.dtype == stock.dtype
        check(f"value {place}", value, stock, truth)


def test_rows_are_widened_a_chunk_at_a_time(op_device: str, check: Any, monkeypatch: Any) -> None:
    layers = dataclasses.replace(FORMS["q, k, v"], dtype=BF16)
    tensors = layers.tensors(op_device, tokens=(5, 11))
    whole = gradients(layers.run, tensors)
    monkeypatch.setattr(products, "WIDENED_BYTES", 7 * 40 * 4)
    exact = gradients(layers.reference, tensors, torch.float64)
    for value, same, truth in zip(gradients(layers.run, tensors), whole, exact, strict=True):
        check("in chunks", value, same, truth)


# The interpreter multiplies the bits of bfloat16 tiles as integers.
KERNEL_DTYPES = (torch.float16, pytest.param(BF16, marks=pytest.mark.gpu))


@pytest.fixture
def extended_rows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make base and adapters one product wherever that is possible; returns what was computed so."""
    done: list[str] = []

    def noted(module: Any, name: str) -> None:
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: (done.append(name), run(*arguments))[1])

    monkeypatch.setattr(extended, "is_extensible", lambda x: True)
    monkeypatch.setattr(extended, "moves_less", lambda copied, added: True)
    noted(forward, "extended_forward")
    noted(backward, "extended_backward")
    return done


SCALES = dataclasses.replace(
    FORMS["q, k, v"], adapters=((0, 4, 2.0, False), (1, 4, 2.0, False), (2, 6, 0.5, False))
)
EXTENDED = {
    **{name: form for name, form in FORMS.items() if name != "own inputs only"},
    "two of one scale": SCALES,
    "full rows": Layers((24, 16), ((0, 16, 2.0, False), (1, 16, 0.3, False)), in_width=64),
    "a layer without": Layers((24, 16, 8), ((0, 8, 2.0, False), (2, 8, 0.3, False)), in_width=64),
}


@pytest.mark.parametrize("form", EXTENDED)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp16"])
def test_one_product_of_longer_rows(
    form: str, dtypes: str, op_device: str, check: Any, extended_rows: list[str]
) -> None:
    layers = dataclasses.replace(EXTENDED[form], **DTYPES[dtypes])
    tensors = layers.tensors(op_device)
    exact = gradients(layers.reference, tensors, torch.float64)
    eager = gradients(layers.reference, tensors)
    ours = gradients(layers.run, tensors)
    assert extended_rows == ["extended_forward", "extended_backward"]
    for place, (value, stock, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        check(f"value {place}", value, stock, truth)


def test_longer_rows_are_for_one_dtype_and_layers_in_order(op_device: str, extended_rows: list[str]) -> None:
    mixed = dataclasses.replace(FORMS["q, k, v"], **DTYPES["fp32 adapters"])
    gradients(mixed.run, mixed.tensors(op_device))
    assert extended_rows == []
    swapped = dataclasses.replace(FORMS["q, k, v"], adapters=((1, 4, 2.0, False), (0, 4, 0.5, False)))
    gradients(swapped.run, swapped.tensors(op_device))
    assert extended_rows == ["extended_backward"]


SIZES = {
    "q, k, v": ((3584, 512, 512), 3584, True, True),
    "o": ((3584,), 3584, True, True),
    "gate, up": ((18944, 18944), 3584, True, False),
    "down": ((3584,), 18944, False, True),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("coding", ["nf4:64", ""], ids=["codes", "dense"])
def test_longer_rows_are_chosen_by_the_bytes_they_move(name: str, coding: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(extended, "is_extensible", lambda x: True)
    widths, in_width, in_forward, in_backward = SIZES[name]
    count, rank = len(widths), 16
    meta = dict(device="meta", dtype=BF16)
    x = torch.empty(8192, in_width, **meta)
    weights = [
        Weight(torch.empty(width, in_width, **meta), (None,) * 4, coding, width, in_width, BF16)
        for width in widths
    ]
    a, b = (
        torch.empty(rank * count, in_width, **meta),
        [torch.empty(width, rank, **meta) for width in widths],
    )
    form = Form((0,) * count, tuple(range(count)), (2.0,) * count, BF16)
    dys = [torch.empty(8192, width, **meta) for width in widths]
    assert extended.extends_forward(x, weights, a, b, form) == in_forward
    assert extended.extends_backward(x, dys, weights, a, form) == in_backward


def four_bits(width: int, in_width: int, device: str) -> list[Any]:
    """Return packed codes, and the four tensors that belong to them."""
    size = width * in_width
    packed = torch.randint(0, 256, (size // 2, 1), dtype=torch.uint8, device=device)
    codes = torch.randint(0, 256, (size // 64,), dtype=torch.uint8, device=device)
    codebook = torch.linspace(-1, 1, 256, device=device)
    nested = torch.rand(-(-size // 64 // 256), device=device)
    return [packed, codes, codebook, nested, torch.tensor(0.3, device=device)]


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether both are equal; on a GPU, where products of other forms round elsewhere, to a rounding."""
    if one.device.type == "cpu":
        return torch.equal(one, other)
    return bool((one.float() - other.float()).norm() <= torch.finfo(BF16).eps * other.float().norm())


@pytest.mark.parametrize("longer", [True, False])
def test_four_bit_weights_are_decoded_within_the_op(
    longer: bool, op_device: str, request: pytest.FixtureRequest
) -> None:
    if longer:
        request.getfixturevalue("extended_rows")
    layers = Layers((24, 16), ((0, 4, 2.0, False), (1, 8, 0.5, False)), BF16, BF16, in_width=64, biases=False)
    x, _, *rest = (tensor.detach() for tensor in layers.tensors(op_device))
    a, b, widths = torch.cat(rest[2:4]), rest[4:6], list(layers.widths)
    stored = [four_bits(width, 64, op_device) for width in widths]
    weights = [
        dequantize_4bit(*codes, shape=(width, 64), blocksize=64, quant_type="nf4", dtype=BF16)
        for codes, width in zip(stored, widths, strict=True)
    ]
    tail = ([None, None], [a], b)
    attributes = ([0, 0], [0, 1], [2.0, 0.5])
    dense = (weights, *tail, [None] * 8, ["", ""], widths, *attributes)
    coded = (
        [codes[0] for codes in stored],
        *tail,
        [tensor for codes in stored for tensor in codes[1:]],
        ["nf4:64", "nf4:64"],
        widths,
        *attributes,
    )
    ops = torch.ops.fxopt
    for one, other in zip(
        ops.lora_linear([x], *dense, BF16), ops.lora_linear([x], *coded, BF16), strict=True
    ):
        assert is_same(one, other)
    dys = [torch.randn(3, 7, width, device=op_device).to(BF16) for width in widths]
    needs = [True, False, False, False, False, True, True, True]
    found = [ops.lora_linear_backward(dys, [x], *lists, needs) for lists in (dense, coded)]
    assert all(is_same(one, other) for one, other in zip(*found, strict=True))


def test_the_inputs_gradient_reads_nothing_of_the_input(op_device: str) -> None:
    layers = FORMS["an own input"]
    x, weights, biases, inputs, a, b = layers.split([t.detach() for t in layers.tensors(op_device)])
    own = next(item for item in inputs if item is not None)
    joined = [a[1], torch.cat([a[0], a[2]])]
    b = [b[1], b[0], b[2]]
    dense = ([None] * 8, ["", ""], list(layers.widths))
    arguments = (weights, biases, joined, b, *dense, [0, 1, 1], [0, 1, 0], [0.5, 2.0, 1.0])
    dys = [torch.randn(3, 7, width, device=op_device) for width in layers.widths]
    needs = [True, True] + [False] * 9
    run = torch.ops.fxopt.lora_linear_backward
    unread = [torch.full_like(x, float("nan")), torch.full_like(own, float("nan"))]
    for one, other in zip(
        run(dys, [x, own], *arguments, needs), run(dys, unread, *arguments, needs), strict=True
    ):
        assert torch.equal(one, other)
        assert not one.isnan().any()


@pytest.mark.parametrize("rows", [1, 63, 200])
@pytest.mark.parametrize(("columns", "rank"), [(32, 1), (1000, 16), (264, 48)])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("copied", [True, False])
def test_rows_and_their_products_by_one_kernel(
    rows: int, columns: int, rank: int, dtype: torch.dtype, copied: bool, device: str, check: Any
) -> None:
    if dtype == BF16 and device == "cpu":
        pytest.skip(
            "Triton's interpreter multiplies the bits of bfloat16 tiles as integers; the GPU variant runs"
        )
    torch.manual_seed(0)
    x = torch.randn(rows, columns, device=device).to(dtype)
    factor = torch.randn(rank, columns, device=device).to(dtype).t()
    width = extended.padded(rank)
    out = torch.empty(rows, columns + width, device=device, dtype=dtype)
    for given in (factor, factor.contiguous()):
        out.fill_(float("nan"))
        copy = out[:, :columns] if copied else None
        extend.launch_extend(x, given, 0.5, copy, out[:, columns:], rank)
        if copied:
            assert torch.equal(out[:, :columns], x)
        products = out[:, columns:]
        assert not products[:, rank:].any()
        check("products", products[:, :rank], 0.5 * (x @ factor), 0.5 * (x.double() @ factor.double()))


@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 40, 1), (300, 1000, 16), (513, 264, 24)])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_two_products_by_one_read(
    rows: int, columns: int, rank: int, dtype: torch.dtype, device: str, check: Any
) -> None:
    if dtype == BF16 and device == "cpu":
        pytest.skip(
            "Triton's interpreter multiplies the bits of bfloat16 tiles as integers; the GPU variant runs"
        )
    torch.manual_seed(0)
    dy, factor, left = (
        torch.randn(shape, device=device).to(dtype) / 8
        for shape in ((rows, columns), (columns, rank), (rows, rank + 3))
    )
    outer, part = torch.empty(rows, rank + 5, device=device, dtype=dtype)[:, 2 : 2 + rank], left[:, 3:]
    sums = one_read.launch_narrow_products(dy, factor, part, 0.5, outer)
    wide = [tensor.double() for tensor in (dy, factor, part)]
    check("outer", outer, 0.5 * (dy @ factor), 0.5 * (wide[0] @ wide[1]))
    check("sums", sums, 0.5 * (dy.t() @ part), 0.5 * (wide[0].t() @ wide[2]))


@pytest.mark.parametrize("form", ["q, k, v", "two adapters", "an own input"])
@pytest.mark.parametrize("of", ["gradients", "inputs"])
def test_products_of_gradients_or_inputs_by_one_read(
    form: str, of: str, device: str, check: Any, monkeypatch: Any
) -> None:
    read: list[torch.Size] = []
    run = one_read.launch_narrow_products

    def launch_narrow_products(rows: torch.Tensor, *arguments: Any) -> torch.Tensor:
        read.append(rows.shape)
        return run(rows, *arguments)

    monkeypatch.setattr(backward, "launch_narrow_products", launch_narrow_products)
    # the factor of an input is A^T, a view; that of a gradient is B as it is
    monkeypatch.setattr(
        backward, "reads_once", lambda rows, factor, left: factor.is_contiguous() is (of == "gradients")
    )
    layers = dataclasses.replace(FORMS[form], **DTYPES["fp16"])
    tensors = layers.tensors(device)
    exact = gradients(layers.reference, tensors, torch.float64)
    eager = gradients(layers.reference, tensors)
    for place, (value, stock, truth) in enumerate(
        zip(gradients(layers.run, tensors), eager, exact, strict=True)
    ):
        check(f"value {place}", value, stock, truth)
    assert read


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("widths", "in_width", "num_reads"), [((8192, 8192, 16), 256, 2), ((16,), 8192, 1)], ids=["dY", "x"]
)
def test_wide_matrices_are_read_once(
    widths: tuple[int, ...], in_width: int, num_reads: int, check: Any, monkeypatch: Any
) -> None:
    done: list[int] = []
    run = one_read.launch_narrow_products
    monkeypatch.setattr(
        backward, "launch_narrow_products", lambda *arguments: (done.append(1), run(*arguments))[1]
    )
    adapters = ((0, 16, 2.0, False), (1, 16, 0.5, False))[: len(widths)]
    form = Layers(widths, adapters, in_width=in_width)
    layers = dataclasses.replace(form, **DTYPES["bf16"])
    tensors = layers.tensors("cuda", tokens=(2, 2048))
    exact = gradients(layers.reference, tensors, torch.float64)
    eager = gradients(layers.reference, tensors)
    for place, (value, stock, truth) in enumerate(
        zip(gradients(layers.run, tensors), eager, exact, strict=True)
    ):
        check(f"value {place}", value, stock, truth)
    assert sum(done) == num_reads


def test_no_tokens(op_device: str) -> None:
    layers = FORMS["q, k, v"]
    found = gradients(layers.run, layers.tensors(op_device, tokens=(0, 7)))
    assert not any(value.isnan().any() for value in found)
    assert all(not value.any() for value in found[len(layers.widths) :])


def test_gradients_exist_for_what_needs_them_only(op_device: str) -> None:
    layers = FORMS["an own input"]
    tensors = layers.tensors(op_device)
    asked = {0, 3, 6, 9}
    for place, tensor in enumerate(tensors):
        tensor.requires_grad_(place in asked)
    calls: list[list[bool]] = []
    backward = op._backward_op
    try:
        op._backward_op = lambda *arguments: (calls.append(arguments[-1]), backward(*arguments))[1]
        results = layers.run(*tensors)
        torch.autograd.backward(results, [torch.ones_like(y) for y in results])
    finally:
        op._backward_op = backward
    assert sum(calls[0]) == len(asked)
    for place, tensor in enumerate(tensors):
        assert (tensor.grad is not None) == (place in asked)


@pytest.mark.parametrize("layout", ["half", "transposed", "column_stride", "expanded"])
def test_strides(layout: str, op_device: str, check: Any) -> None:
    layers = FORMS["q, k, v"]
    tensors = layers.tensors(op_device)
    base = torch.randn(7, 3, 80, device=op_device)
    tensors[0] = {
        "half": base[..., 40:].transpose(0, 1).contiguous()[..., :40],
        "transposed": base[..., :40].transpose(0, 1),
        "column_stride": base.transpose(0, 1)[..., ::2],
        "expanded": base[:1, :1, :40].expand(3, 7, 40),
    }[layout]
    exact = gradients(layers.reference, tensors, torch.float64)
    eager = gradients(layers.reference, tensors)
    for value, stock, truth in zip(gradients(layers.run, tensors), eager, exact, strict=True):
        check(layout, value, stock, truth)


def test_inputs_are_not_written_to(op_device: str) -> None:
    layers = FORMS["an own input"]
    tensors = layers.tensors(op_device)
    before = [tensor.detach().clone() for tensor in tensors]
    gradients(layers.run, tensors)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


def test_the_op_is_registered_as_torch_wants_it(op_device: str, opcheck: Any) -> None:
    layers = FORMS["q, k, v"]
    x, weights, biases, _, a, b = layers.split([t.detach() for t in layers.tensors(op_device)])
    joined = [torch.cat(a)]
    dense = ([None] * 12, [""] * 3, list(layers.widths))
    arguments = ([x], weights, biases, joined, b, *dense, [0, 0, 0], [0, 1, 2], [2.0, 0.5, 1.0])
    opcheck(torch.ops.fxopt.lora_linear.default, (*arguments, FP32))
    dys = [torch.randn(3, 7, width, device=op_device) for width in layers.widths]
    needs = [True] * (1 + 3 + 3 + 1 + 3)
    opcheck(torch.ops.fxopt.lora_linear_backward.default, (dys, *arguments, needs))


def test_arguments_are_checked() -> None:
    x, weights, biases, inputs, a, b = FORMS["q, k, v"].split(FORMS["q, k, v"].tensors("cpu"))
    with pytest.raises(ValueError, match="as many inputs, a, b, owners and scales"):
        lora_linear(x, weights, biases, inputs, a, b[:2], owners=[0, 1, 2], scales=[1.0] * 3)
    with pytest.raises(ValueError, match="a bias or None per weight"):
        lora_linear(x, weights, biases[:1], inputs, a, b, owners=[0, 1, 2], scales=[1.0] * 3)
