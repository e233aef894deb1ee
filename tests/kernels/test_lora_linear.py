"""lora_linear: the op against plain torch in float64, for one layer and for several that share their input."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fxopt.kernels import lora_linear as file
from fxopt.kernels.lora_linear import lora_linear, lora_linear_reference

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
    monkeypatch.setattr(file, "WIDENED_BYTES", 7 * 40 * 4)
    exact = gradients(layers.reference, tensors, torch.float64)
    for value, same, truth in zip(gradients(layers.run, tensors), whole, exact, strict=True):
        check("in chunks", value, same, truth)


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
    backward = file._backward_op
    try:
        file._backward_op = lambda *arguments: (calls.append(arguments[-1]), backward(*arguments))[1]
        results = layers.run(*tensors)
        torch.autograd.backward(results, [torch.ones_like(y) for y in results])
    finally:
        file._backward_op = backward
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
    arguments = ([x], weights, biases, joined, b, [0, 0, 0], [0, 1, 2], [2.0, 0.5, 1.0])
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
