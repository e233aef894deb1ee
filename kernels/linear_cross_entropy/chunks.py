"""The loss and all gradients of a linear head, by chunks of rows.

Method: rows go through in chunks whose logits take at most `chunk_bytes`. Per chunk: one GEMM for the logits, one
kernel that writes the row losses and turns the logits in place into their gradient, then the GEMMs for the gradients of
h and W, accumulated. Gradients are so computed in forward, for the inputs that require them; backward only scales them.
Ignored rows are left out (unless `z_rows="all"` counts them), but for those that fill up the first chunk, as zeros. The
host reads their number once, after it has launched that chunk; while a CUDA graph is captured all are computed, with
gradient 0. Nothing else waits. A head that is frozen has a shorter first chunk: with dW each chunk reads and writes it.

Memory beside the gradients: the logits of one chunk, its rows of h and of dh, one loss per row. A row of logits is
padded to a multiple of ROW_ALIGNMENT columns: with 32,001 classes the GEMMs would otherwise find rows at odd
addresses, where neither they nor the row kernel can move 16 bytes at a time.

Numerics: logits are rounded to the dtype of h, as in stock models; the rest in fp32, the loss too. The divisor is
applied before the gradient of the logits is rounded, but for fp16: there small probabilities would vanish and sums
over rows overflow, so dlogits stay undivided (at most scale * (1 + 2 z_loss lse) in size), dW is summed in fp32 and
saved so, and backward divides together with the incoming gradient, where a loss scale comes in.
dW is summed over chunks in the dtype of W up to MOST_ROUNDED_SUMS chunks; beyond that in fp32, then rounded. (Error of
dW in bf16 over eager's own: 1.4 times at 4 rounded sums, 1.85 at 8, 2.45 at 16; 1.0 with sums in fp32.)
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fxopt.kernels.launch import ceil_div, wide_dtype
from fxopt.kernels.linear_cross_entropy.labelled import Labelled, find_chunks
from fxopt.kernels.row_loss import Shaping, find_divisor, find_z_weight

CHUNK_BYTES = 512 * 2**20
TRAINED_ROWS = 2048
"""What a chunk has where dW is needed, or as many as twice CHUNK_BYTES hold: each chunk reads and writes dW, and many
are summed in fp32. 8192 rows of 2304 x 256000 in bf16, an H200: 47.5 ms by 2048 rows, 55.5 by the 1024 of 512 MiB.
"""
ROW_MULTIPLE = 128  # GEMM tiles are full in chunks of whole multiples
ROW_ALIGNMENT = 16
MOST_ROUNDED_SUMS = 6
FIRST_ROWS = 1024


class Outputs(NamedTuple):
    """Loss, the divisor left for backward, and the gradients needed, undivided by it."""

    loss: Tensor
    divisor: Tensor
    dh: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None


def plan_chunk_bytes(vocabulary: int, itemsize: int, *, trains_weight: bool) -> int:
    """Return the most bytes of logits that are held at a time if the caller does not say.

    >>> [plan_chunk_bytes(256_000, 2, trains_weight=trains) // 512_000 for trains in (False, True)]
    [1048, 2048]
    """
    if not trains_weight:
        return CHUNK_BYTES
    return max(CHUNK_BYTES, min(2 * CHUNK_BYTES, TRAINED_ROWS * padded(vocabulary) * itemsize))


def padded(vocabulary: int) -> int:
    """Return the columns that a row of logits takes."""
    return ceil_div(vocabulary, ROW_ALIGNMENT) * ROW_ALIGNMENT


def plan_chunk_rows(num_rows: int, row_bytes: int, chunk_bytes: int) -> int:
    """Return how many rows to take at a time: even chunks below `chunk_bytes`, whole GEMM tiles where they fit.

    >>> plan_chunk_rows(8192, 128256 * 2, 512 * 2**20)
    2048
    """
    most = max(1, chunk_bytes // row_bytes)
    if num_rows <= most:
        return max(1, num_rows)
    unit = ROW_MULTIPLE if most >= ROW_MULTIPLE else 1
    num_chunks = math.ceil(num_rows / (most // unit * unit))
    return math.ceil(num_rows / num_chunks / unit) * unit


def run_chunks(
    run_rows: Callable[..., None],
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    denominator: Tensor | None,
    ignore_index: int,
    mean: bool,
    scale: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    z_all: bool,
    chunk_bytes: int,
    need_h: bool,
    need_weight: bool,
    need_bias: bool,
) -> Outputs:
    """Return the outputs; `run_rows` writes the losses of a chunk, and over its logits their gradient."""
    shaping = Shaping(scale, softcap, label_smoothing, z_loss, z_all)
    wide, vocabulary = wide_dtype(h.dtype), weight.shape[0]
    divisor = find_divisor(labels, denominator, ignore_index, mean, wide)
    divide_later = h.dtype == torch.float16
    row_divisor, later_divisor = divisor, torch.ones_like(divisor)
    if divide_later:
        row_divisor, later_divisor = later_divisor, divisor
        if denominator is None:
            later_divisor = divisor.clamp(min=1)  # no row, no gradient
    z_weight = find_z_weight(divisor, labels.shape[0], shaping)

    labelled = None if shaping.reads_ignored_rows else find_labelled(labels, ignore_index)
    num_rows = labelled.num_rows if labelled and labelled.is_counted else labels.shape[0]
    width = padded(vocabulary)
    row_bytes = width * h.element_size()
    rows = plan_chunk_rows(num_rows, row_bytes, chunk_bytes)
    with_gradient = need_h or need_weight or need_bias
    sum_wide = divide_later or num_rows > rows * MOST_ROUNDED_SUMS

    is_all = labelled is None or (labelled.is_counted and num_rows == labels.shape[0])
    make = h.new_empty if is_all else h.new_zeros
    dh = make(h.shape) if need_h else None
    sum_dtype = wide if sum_wide else weight.dtype
    dweight = weight.new_empty(weight.shape, dtype=sum_dtype) if need_weight else None
    dbias = weight.new_zeros(vocabulary, dtype=wide) if need_bias else None
    if dweight is not None and num_rows == 0:
        dweight.zero_()
    losses = make(num_rows, dtype=wide)
    buffer = h.new_empty((min(rows, num_rows), width))[:, :vocabulary]

    first = rows if need_weight else min(rows, FIRST_ROWS)
    plan = functools.partial(plan_chunk_rows, row_bytes=row_bytes, chunk_bytes=max(1, rows) * row_bytes)
    for places, part, blank in find_chunks(labelled, num_rows, first, plan):
        h_part, logits = h[part], buffer[: places.stop - places.start]
        if blank is not None:
            h_part.masked_fill_(blank.unsqueeze(1), 0)
        if bias is None:
            torch.mm(h_part, weight.t(), out=logits)
        else:
            torch.addmm(bias, h_part, weight.t(), out=logits)
        run_rows(
            logits,
            labels[part],
            losses[places],
            row_divisor,
            z_weight,
            ignore_index,
            shaping,
            with_gradient,
        )
        if dh is not None:
            if isinstance(part, slice):
                torch.mm(logits, weight, out=dh[part])
            else:
                dh.index_copy_(0, part, torch.mm(logits, weight))
        if dweight is not None:
            _add_product(dweight, logits.t(), h_part, first=places.start == 0)
        if dbias is not None:
            dbias += logits.sum(0, dtype=wide)
    if dweight is not None and not divide_later:
        dweight = dweight.to(weight.dtype)
    return Outputs(losses.sum() / divisor, later_divisor, dh, dweight, dbias)


def find_labelled(labels: Tensor, ignore_index: int) -> Labelled | None:
    """Return the rows to compute, or None for all of them."""
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return Labelled(labels, ignore_index)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Add a @ b to `total`, or set it; a wider `total` receives the product unrounded."""
    if total.dtype == a.dtype:
        if first:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
    elif total.is_cuda and torch.cuda.get_device_capability(total.device) >= (8, 0):
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1)
