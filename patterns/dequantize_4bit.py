"""The decoding of a four-bit weight -> one launch, which decodes the absmax of its blocks on the way.

Source: bitsandbytes `Linear4bit`, whose product with a decoded weight is told apart from the decoding when the
graph is brought to its canonical form (`fxopt/graph/quantized.py`).
Saved for backward: nothing; the weight is decoded again there, from the codes.
Numerics: the bits of bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.graph import vocabulary
from fxopt.kernels.dequantize_4bit import TABLES, dequantize_4bit
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import Term, attribute, operation, tensor

ATTRIBUTES = ("shape", "blocksize", "quant_type", "dtype")
BLOCKSIZES = tuple(2**power for power in range(5, 13))
"""Those that bitsandbytes knows; it raises for others when it decodes them."""
OPERANDS = ("codebook", "nested_absmax", "offset")


def search() -> Term:
    """Return the decoding of a weight, its absmax in fp32 or in eight bits."""
    return operation(
        vocabulary.dequantize_4bit,
        tensor("packed"),
        tensor("absmax"),
        *map(attribute, OPERANDS),
        **{name: attribute(name) for name in ATTRIBUTES},
    )


def check(m: Match) -> Mismatch | None:
    """Refuse tables and blocks that the kernel does not know."""
    if m["quant_type"] not in TABLES:
        return m.fail(f"codes are {m['quant_type']}, expected one of {', '.join(TABLES)}", "packed")
    if m["blocksize"] not in BLOCKSIZES:
        return m.fail(
            f"blocks have {m['blocksize']} values, expected a power of two from 32 to 4096", "packed"
        )
    return None


def replace(m: Match) -> Call:
    """Return one call of the op."""
    operands = [m[name] for name in ("packed", "absmax", *OPERANDS)]
    return call(dequantize_4bit, *operands, **{name: m[name] for name in ATTRIBUTES})


class _Product(torch.autograd.Function):
    """A product with a four-bit weight as bitsandbytes spells it, with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, shape: Any, scales: Any) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.shape, ctx.scales = shape, scales
        return _product(x, packed, shape, scales)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (packed,) = ctx.saved_tensors
        library: Any = torch.ops.bitsandbytes
        absmax, *nested = ctx.scales
        if nested:
            absmax = library.dequantize_blockwise.default(absmax, nested[1], nested[0], 256, torch.float32)
            absmax += nested[2]
        weight = library.dequantize_4bit.default(packed, absmax, 64, "nf4", ctx.shape, torch.float32)
        return torch.matmul(gradients[0], weight.to(gradients[0].dtype)), None, None, None


def _product(x: torch.Tensor, packed: torch.Tensor, shape: Any, scales: Any) -> torch.Tensor:
    library: Any = torch.ops.bitsandbytes
    absmax, *nested = scales
    if not nested:
        return library.gemm_4bit.default(x, packed, shape, absmax, 64, "nf4")
    options = dict(absmax_8bit=absmax, absmax_code=nested[0], absmax_offset=nested[2])
    return library.gemm_4bit.default(x, packed, shape, nested[1], 64, "nf4", **options)


def _trained(x: torch.Tensor, packed: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
    result: Any = _Product.apply(x, packed, (24, 64), scales)
    return result


def _frozen(x: torch.Tensor, packed: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
    return _product(x, packed, (24, 64), scales)


def _decoded(x: torch.Tensor, packed: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
    library: Any = torch.ops.bitsandbytes
    absmax, codebook, nested, offset = scales
    absmax = library.dequantize_blockwise.default(absmax, nested, codebook, 256, torch.float32) + offset
    weight = library.dequantize_4bit.default(packed, absmax, 64, "nf4", (24, 64), x.dtype)
    return F.linear(x, weight)


def _inputs(device: torch.device, *, nested: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    x = torch.randn(2, 5, 64, device=device).to(dtype)
    packed = torch.randint(0, 256, (24 * 32, 1), dtype=torch.uint8, device=device)
    if not nested:
        return x, packed, torch.rand(24, device=device) + 0.1
    codes = torch.randint(0, 256, (24,), dtype=torch.uint8, device=device)
    codebook = torch.linspace(-1, 1, 256, device=device)
    return x, packed, codes, codebook, torch.rand(1, device=device), torch.tensor(0.5, device=device)


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield products with four-bit weights; none where the library that has the ops was not imported."""
    if not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        return
    for nested in (True, False):
        name = "nested" if nested else "flat"
        x, *codes = _inputs(device, nested=nested)
        yield name, (_trained, (x.requires_grad_(), *codes))
        yield f"{name}, a frozen input", (_frozen, _inputs(device, nested=nested))
    x, *codes = _inputs(device, nested=True, dtype=torch.float32)
    yield "fp32", (_trained, (x.requires_grad_(), *codes))
    yield "decoded by name", (_decoded, (x, *codes))


def near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
    """Yield an op that passes no gradient on: as a linear layer it would."""
    if not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        return
    x, *codes = _inputs(device, nested=True)
    yield "no gradient", (_frozen, (x.requires_grad_(), *codes)), "got gemm_4bit.default"


DEQUANTIZE_4BIT = Pattern(
    name="dequantize_4bit",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    source="bitsandbytes Linear4bit",
)
