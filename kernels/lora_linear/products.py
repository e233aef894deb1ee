"""Products of rows with narrow factors by torch's GEMMs, in the wider dtype of the two."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

WIDENED_BYTES = 64 * 2**20
"""The most bytes of rows that are held in another dtype at a time."""


def as_rows(tensor: Tensor) -> Tensor:
    """Return `tensor` as [rows, last dimension]."""
    return tensor.reshape(-1, tensor.shape[-1])


def _chunks(rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows in `dtype`: all at once where they are, else as many as `WIDENED_BYTES` hold."""
    if rows.dtype == dtype:
        yield slice(None), rows
        return
    step = max(WIDENED_BYTES // (max(rows.shape[1], 1) * dtype.itemsize), 1)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        yield part, rows[part].to(dtype)


def write_product(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Write scale * left @ right, computed in the dtype of `right`, which is that of `out`."""
    for part, rows in _chunks(left, right.dtype):
        torch.addmm(out[part], rows, right, beta=0, alpha=scale, out=out[part])


def add_product(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Add scale * left @ right to `out`, in the wider of their dtypes, and round once."""
    if out.dtype == right.dtype == left.dtype:
        out.addmm_(left, right, alpha=scale)
    elif torch.promote_types(out.dtype, right.dtype) == out.dtype:
        out.addmm_(left.to(out.dtype), right.to(out.dtype), alpha=scale)  # as narrow as an adapter
    else:
        for part, rows in _chunks(out, right.dtype):
            out[part] = rows.addmm_(left[part], right, alpha=scale)


def sum_product(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Return scale * left^T @ right over all rows, in the dtype of `left`."""
    out = left.new_empty((left.shape[1], right.shape[1]))
    beta = 0
    for part, rows in _chunks(right, left.dtype):
        torch.addmm(out, left[part].t(), rows, beta=beta, alpha=scale, out=out)
        beta = 1
    return out if beta else out.zero_()


def inner_product(x: Tensor, a: Tensor) -> Tensor:
    """Return x A^T of one input with all its adapters."""
    out = a.new_empty((x.shape[0], a.shape[0]))
    write_product(out, x, a.t())
    return out
