"""Which adapter belongs where, and how a layer's weight is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.kernels.dequantize_4bit import decode_into
from fxopt.kernels.lora_linear.joined import join_rows

CODE_TENSORS = 4
"""Tensors beside the packed codes of a four-bit weight: absmax, codebook, nested absmax, offset."""


class Form(NamedTuple):
    """Which adapter reads which input and belongs to which layer, in the order of the inputs; and the factors."""

    inputs: tuple[int, ...]
    owners: tuple[int, ...]
    scales: tuple[float, ...]
    out_dtype: torch.dtype

    def places(self, b: Sequence[Tensor]) -> Iterator[tuple[int, slice]]:
        """Yield of each adapter its input, and its columns among those of all adapters of that input."""
        starts: dict[int, int] = {}
        for source, factor in zip(self.inputs, b, strict=True):
            start = starts.get(source, 0)
            starts[source] = start + factor.shape[1]
            yield source, slice(start, starts[source])


class Weight(NamedTuple):
    """A layer's weight of [width, in_width]: dense, or four-bit codes where `coding` is "<type>:<block size>"."""

    stored: Tensor
    code_tensors: tuple[Tensor | None, ...]
    coding: str
    width: int
    in_width: int
    dtype: torch.dtype

    def dense(self) -> Tensor:
        """Return the weight as a matrix, decoded where it has to be."""
        if not self.coding:
            return self.stored
        out = self.stored.new_empty((self.width, self.in_width), dtype=self.dtype)
        self.write(out)
        return out

    def write(self, out: Tensor, tail: Tensor | None = None, tail_start: int = 0) -> None:
        """Write the weight into the first columns of `out`, `tail` beside it from `tail_start` on, zeros elsewhere."""
        if self.coding:
            kind, block = self.coding.split(":")
            absmax, codebook, nested, offset = self.code_tensors
            assert absmax is not None
            codes = self.stored, absmax, codebook, nested, offset
            decode_into(out, *codes, self.in_width, int(block), kind, tail, tail_start)
            return
        join_rows(out, self.stored, tail, tail_start)


def read_weights(
    x: Tensor,
    stored: Sequence[Tensor],
    code_tensors: Sequence[Tensor | None],
    codings: Sequence[str],
    widths: Sequence[int],
) -> list[Weight]:
    """Return the weights that the lists of an op stand for."""
    found: list[Weight] = []
    for place, (tensor, coding, width) in enumerate(zip(stored, codings, widths, strict=True)):
        others = code_tensors[place * CODE_TENSORS : (place + 1) * CODE_TENSORS]
        dtype = x.dtype if coding else tensor.dtype
        found.append(Weight(tensor, tuple(others), coding, width, x.shape[-1], dtype))
    return found


def split_lists(items: Sequence[Any], num_inputs: int, num_layers: int) -> list[list[Any]]:
    """Return what there is for xs, weights, biases, a and b."""
    lists: list[list[Any]] = []
    start = 0
    for count in (num_inputs, num_layers, num_layers, num_inputs, len(items)):
        lists.append(list(items[start : start + count]))
        start += count
    return lists
