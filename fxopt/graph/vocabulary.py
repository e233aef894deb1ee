"""The closed vocabulary of the canonical graph: each op one callable, operands in order, attributes by name.

After `canonicalize`, a node that calls one of these has exactly the form given here, or it is a form that
the vocabulary does not name (an `add` with `alpha`, a full reduction). That, and every other op of torch's, stands in
the form that `any_op` gives to all: a function, its operands in order, the rest by name.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.graph.torch_private import TORCH_LINEAR

NESTED_BLOCKSIZE = 256
LOOP_OVER_GROUPS = "transformers::grouped_mm_fallback"
"""The op of a library that computes a grouped product in any dtype."""


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` in `dtype`, rounded to nearest; on the same device.

    >>> cast(torch.ones(2), torch.float64).dtype
    torch.float64
    """
    return x.to(dtype)


def reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return `x` in `shape`, its items in the same order; a view wherever that is possible.

    >>> reshape(torch.ones(2, 3), (3, -1)).shape
    torch.Size([3, 2])
    """
    return x.reshape(shape)


def expand(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a view of `x` in which dims of size 1 repeat up to `shape`; -1 leaves a dim as it is.

    >>> expand(torch.ones(2, 1), (-1, 3)).stride()
    (1, 0)
    """
    return x.expand(shape)


def contiguous(x: Tensor) -> Tensor:
    """Return `x` in dense row-major layout; `x` itself where it already is.

    >>> contiguous(torch.ones(2, 3).mT).stride()
    (2, 1)
    """
    return x.contiguous()


def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return one fixed number as a tensor without dims.

    >>> constant(0.5, torch.bfloat16, torch.device("cpu"))
    tensor(0.5000, dtype=torch.bfloat16)
    """
    return torch.full((), value, dtype=dtype, device=device)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: tuple[int, ...],
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight that four-bit codes stand for, as the library that made them decodes it.

    `absmax` is in eight bits where there is a codebook: then it stands for codebook[code] * nested_absmax + offset.
    """
    ops: Any = torch.ops.bitsandbytes
    if codebook is not None and nested_absmax is not None and offset is not None:
        scales, codes = nested_absmax.float(), codebook.float()
        absmax = ops.dequantize_blockwise.default(absmax, scales, codes, NESTED_BLOCKSIZE, torch.float32)
        absmax = absmax + offset
    absmax = absmax.float()
    stored = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    return ops.dequantize_4bit.default(packed, absmax, blocksize, quant_type, shape, stored).to(dtype)


def grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Return the rows of `x`, group g of them multiplied by `w[g]`; it ends before row `ends[g]`.

    x: [S, K]; w: [G, K, N]; ends: [G], rising. By torch's own op in bfloat16, else by the library's that models call,
    else, where there is none, by one product per group over all rows.
    """
    if x.dtype == torch.bfloat16:
        return F.grouped_mm(x, w, offs=ends)
    library: Any = getattr(torch.ops, LOOP_OVER_GROUPS.partition("::")[0])
    loop = getattr(library, LOOP_OVER_GROUPS.partition("::")[2], None)
    if loop is not None:
        return loop(x, w, ends)
    group = torch.searchsorted(ends.long(), torch.arange(x.shape[0], device=x.device), right=True)
    parts = [torch.where((group == place)[:, None], x @ w[place], 0.0) for place in range(w.shape[0])]
    return torch.stack(parts).sum(0)


@dataclasses.dataclass(frozen=True)
class Op:
    """One op of the vocabulary: `operands` are its positional arguments, `attributes` its keywords.

    `index`, the shape of a norm and the list of a `cat` or `stack` are operands by their place, though not tensors.
    """

    name: str
    target: Callable[..., Any]
    operands: tuple[str, ...] = ("x",)
    attributes: tuple[str, ...] = ()
    commutative: bool = False


OPS: tuple[Op, ...] = (
    Op("add", torch.add, ("a", "b"), commutative=True),
    Op("sub", torch.sub, ("a", "b")),
    Op("mul", torch.mul, ("a", "b"), commutative=True),
    Op("div", torch.div, ("a", "b")),
    Op("ne", torch.ne, ("a", "b")),
    Op("eq", torch.eq, ("a", "b")),
    Op("lt", torch.lt, ("a", "b")),
    Op("le", torch.le, ("a", "b")),
    Op("gt", torch.gt, ("a", "b")),
    Op("ge", torch.ge, ("a", "b")),
    Op("neg", torch.neg),
    Op("pow", torch.pow, ("x",), ("exponent",)),
    Op("sqrt", torch.sqrt),
    Op("rsqrt", torch.rsqrt),
    Op("reciprocal", torch.reciprocal),
    Op("exp", torch.exp),
    Op("tanh", torch.tanh),
    Op("erf", torch.erf),
    Op("sigmoid", torch.sigmoid),
    Op("abs", torch.abs),
    Op("mean", torch.mean, ("x",), ("dim", "keepdim")),
    Op("sum", torch.sum, ("x",), ("dim", "keepdim")),
    Op("var", torch.var, ("x",), ("dim", "correction", "keepdim")),
    Op("std", torch.std, ("x",), ("dim", "correction", "keepdim")),
    Op("logsumexp", torch.logsumexp, ("x",), ("dim", "keepdim")),
    Op("max", torch.max, ("x",), ("dim", "keepdim")),
    Op("cast", cast, ("x",), ("dtype",)),
    Op("silu", F.silu),
    Op("relu", F.relu),
    Op("gelu", F.gelu, ("x",), ("approximate",)),
    Op("clamp", torch.clamp, ("x",), ("min", "max")),
    Op("glu", F.glu, ("x",), ("dim",)),
    Op("linear", TORCH_LINEAR, ("x", "w", "bias")),
    Op("matmul", torch.matmul, ("a", "b")),
    Op("grouped_mm", grouped_mm, ("x", "w", "ends")),
    Op(
        "dequantize_4bit",
        dequantize_4bit,
        ("packed", "absmax", "codebook", "nested_absmax", "offset"),
        ("shape", "blocksize", "quant_type", "dtype"),
    ),
    Op("reshape", reshape, ("x",), ("shape",)),
    Op("expand", expand, ("x",), ("shape",)),
    Op("tile", torch.tile, ("x",), ("dims",)),
    Op("transpose", torch.transpose, ("x",), ("dim0", "dim1")),
    Op("permute", torch.permute, ("x",), ("dims",)),
    Op("unsqueeze", torch.unsqueeze, ("x",), ("dim",)),
    Op("squeeze", torch.squeeze, ("x",), ("dim",)),
    Op("contiguous", contiguous),
    Op("getitem", operator.getitem, ("x", "index")),
    Op("cat", torch.cat, ("tensors",), ("dim",)),
    Op("repeat_interleave", torch.repeat_interleave, ("x", "repeats"), ("dim",)),
    Op("sort", torch.sort, ("x",), ("dim", "descending", "stable")),
    Op("topk", torch.topk, ("x",), ("k", "dim", "sorted")),
    Op("gather", torch.gather, ("x",), ("dim", "index")),
    Op("cumsum", torch.cumsum, ("x",), ("dim", "dtype")),
    Op("stack", torch.stack, ("tensors",), ("dim",)),
    Op("chunk", torch.chunk, ("x",), ("chunks", "dim")),
    Op("split", torch.split, ("x",), ("split_size_or_sections", "dim")),
    Op("pad", F.pad, ("x",), ("pad", "mode", "value")),
    Op(
        "cross_entropy",
        F.cross_entropy,
        ("logits", "target", "weight"),
        ("ignore_index", "reduction", "label_smoothing"),
    ),
    Op("rms_norm", F.rms_norm, ("x", "normalized_shape", "weight"), ("eps",)),
    Op("layer_norm", F.layer_norm, ("x", "normalized_shape", "weight", "bias"), ("eps",)),
    Op("constant", constant, (), ("value", "dtype", "device")),
    Op("masked_fill", torch.masked_fill, ("x", "mask", "value")),
    Op("where", torch.where, ("condition", "a", "b")),
    Op("softmax", F.softmax, ("x",), ("dim", "dtype")),
    Op(
        "scaled_dot_product_attention",
        F.scaled_dot_product_attention,
        ("q", "k", "v", "mask"),
        ("dropout_p", "is_causal", "scale", "enable_gqa"),
    ),
)
"""Dims are negative (counted from the last), a reduction's a tuple; tuples where torch takes lists."""

BY_NAME: dict[str, Op] = {op.name: op for op in OPS}
BY_TARGET: dict[Callable[..., Any], Op] = {op.target: op for op in OPS}
COMMUTATIVE: frozenset[Callable[..., Any]] = frozenset(op.target for op in OPS if op.commutative)
