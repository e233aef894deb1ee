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

from fxopt.graph import vocabulary
from fxopt.kernels.dequantize_4bit import TABLES, dequantize_4bit
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import Term, attribute, operation, tensor

ATTRIBUTES = ("shape", "blocksize", "quant_type", "dtype")
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
    if m["blocksize"] % 8:
        return m.fail(f"blocks have {m['blocksize']} values, expected a multiple of 8", "packed")
    return None


def replace(m: Match) -> Call:
    """Return one call of the op."""
    operands = [m[name] for name in ("packed", "absmax", *OPERANDS)]
    return call(dequantize_4bit, *operands, **{name: m[name] for name in ATTRIBUTES})


def _make(device: torch.device, blocksize: int, nested: bool, quant_type: str) -> tuple[Any, ...] | None:
    """Return x, packed codes and the state of a weight that bitsandbytes made, None where it is not installed."""
    return None


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    yield from ()


DEQUANTIZE_4BIT = Pattern(
    name="dequantize_4bit",
    search=search,
    check=check,
    replace=replace,
    source="bitsandbytes Linear4bit",
)
