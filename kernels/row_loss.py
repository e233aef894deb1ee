"""The loss of one row of class logits, and its gradient: the arithmetic of every cross entropy here.

    z     = softcap * tanh(scale * logits / softcap)        scale * logits without a softcap
    lse   = log sum exp z, held as (max z, lse - max z): small differences of large logits survive
    row   = (1 - smoothing) * (lse - z[label]) + smoothing * (lse - mean z) + z_loss * lse^2
    loss  = sum of the rows whose label is not ignore_index / divisor
    divisor: the denominator if given, else the number of those rows for "mean", else 1

With `z_rows="all"` the last term is left out of the rows, and z_loss * mean lse^2 over all rows, ignored ones too,
is added to the loss: as z_weight * lse^2 in every row, z_weight = z_loss * divisor / number of rows.

    dz    = w * (softmax z - (1 - smoothing) * onehot - smoothing / V) + 2 * z_weight * lse * softmax z
    w     = 1; 0 for an ignored label; NaN for one outside [0, V), where the loss is NaN too (on a CPU: IndexError)

Source: `torch.nn.functional.cross_entropy`; z_loss from Chowdhery et al. 2022, "PaLM", section 5, and over all rows
as transformers' `BambaForCausalLM` has it.

Numerics: fp32, fp64 for fp64 logits. Infinite and NaN logits give what torch gives.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fxopt.kernels.launch import jit, next_power_of_two, tl, wide_dtype

REDUCTIONS = ("mean", "sum")
Z_ROWS = ("labelled", "all")
LOG2E = tl.constexpr(1.4426950408889634)
VECTOR = tl.constexpr(8)
LEAST_COLUMNS = 8


class Shaping(NamedTuple):
    """What is done to the logits and to the loss of a row."""

    scale: float = 1.0
    softcap: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    z_all: bool = False

    @property
    def reads_ignored_rows(self) -> bool:
        """Whether a row counts though its label is ignored."""
        return self.z_all and self.z_loss != 0


SHAPING_SCHEMA = "float scale, float softcap, float label_smoothing, float z_loss, bool z_all"


def check_loss(op: str, reduction: str, z_rows: str, denominator: Tensor | float | None) -> None:
    """Raise ValueError where `op` is asked for what it does not compute."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction, expected one of {REDUCTIONS}, got {reduction!r}")
    if z_rows not in Z_ROWS:
        raise ValueError(f"{op}: z_rows, expected one of {Z_ROWS}, got {z_rows!r}")
    if isinstance(denominator, Tensor) and denominator.requires_grad:
        raise ValueError(f"{op}: denominator requires grad, expected a constant")


def as_tensor(denominator: Tensor | float | None, like: Tensor) -> Tensor | None:
    """Return a denominator that is a number as a tensor on the device of `like`."""
    if denominator is None or isinstance(denominator, Tensor):
        return denominator
    return torch.full((), denominator, dtype=wide_dtype(like.dtype), device=like.device)


def find_divisor(
    labels: Tensor, denominator: Tensor | None, ignore_index: int, mean: bool, dtype: torch.dtype
) -> Tensor:
    """Return what the sum of the rows is divided by, a new tensor."""
    if denominator is not None:
        return denominator.detach().to(labels.device, dtype, copy=True).reshape(())
    if mean:
        return (labels != ignore_index).sum(dtype=dtype)
    return torch.ones((), dtype=dtype, device=labels.device)


def find_z_weight(divisor: Tensor, num_rows: int, shaping: Shaping) -> Tensor | None:
    """Return what lse^2 is multiplied by in a row; None without a z_loss."""
    if not shaping.z_loss:
        return None
    if shaping.z_all:
        return divisor * (shaping.z_loss / max(num_rows, 1))
    return torch.full_like(divisor, shaping.z_loss)


def reference_loss(
    logits: Tensor,
    labels: Tensor,
    denominator: Tensor | float | None,
    ignore_index: int,
    mean: bool,
    shaping: Shaping,
) -> Tensor:
    """Return the loss of logits [N, V], differentiable, in plain torch: the specification."""
    valid = labels != ignore_index
    wide = wide_dtype(logits.dtype)
    z, _ = shape_plainly(logits if shaping.z_all else logits[valid], shaping, wide)
    labelled = z[valid] if shaping.z_all else z
    log_softmax = torch.log_softmax(labelled, -1)
    rows = -(1 - shaping.label_smoothing) * log_softmax.gather(-1, labels[valid].unsqueeze(-1)).squeeze(-1)
    if shaping.label_smoothing:
        rows = rows - shaping.label_smoothing * log_softmax.mean(-1)
    if shaping.z_loss and not shaping.z_all:
        rows = rows + shaping.z_loss * labelled.logsumexp(-1).square()
    divisor = find_divisor(labels, as_tensor(denominator, logits), ignore_index, mean, wide)
    loss = rows.sum() / divisor
    if shaping.reads_ignored_rows:
        loss = loss + shaping.z_loss * z.logsumexp(-1).square().mean()
    return loss


def shape_plainly(logits: Tensor, shaping: Shaping, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return z, and tanh(scale * logits / softcap) if there is a softcap."""
    z = logits.to(dtype) * shaping.scale
    if not shaping.softcap:
        return z, None
    tanh = torch.tanh(z / shaping.softcap)
    return shaping.softcap * tanh, tanh


def plain_statistics(z: Tensor) -> Tensor:
    """Return max z and lse - max z of each row, [2, N]."""
    largest = z.amax(-1)
    zero_point = torch.where(largest == -torch.inf, 0.0, largest)  # -inf - -inf would be NaN
    rest = torch.exp(z - zero_point.unsqueeze(-1)).sum(-1).log()
    return torch.stack([zero_point, rest])


def plain_losses(
    op: str,
    z: Tensor,
    labels: Tensor,
    statistics: Tensor,
    z_weight: Tensor | None,
    ignore_index: int,
    shaping: Shaping,
) -> Tensor:
    """Return the loss of each row, [N].

    Raises:
        IndexError: on a CPU, `op` was given a label that is no class, the type that torch's own loss raises; elsewhere
            nobody waits for the labels.
    """
    valid = labels != ignore_index
    if labels.is_cpu:
        _check_labels(op, labels[valid], z.shape[-1], ignore_index)
    zero_point, rest = statistics
    target = z.gather(-1, torch.where(valid, labels, 0).unsqueeze(-1)).squeeze(-1)
    rows = (1 - shaping.label_smoothing) * ((zero_point - target) + rest)
    if shaping.label_smoothing:
        rows = rows + shaping.label_smoothing * ((zero_point - z.mean(-1)) + rest)
    rows = torch.where(valid, rows, 0.0)
    if z_weight is not None:
        squares = z_weight * (zero_point + rest).square()
        rows = rows + (squares if shaping.z_all else torch.where(valid, squares, 0.0))
    return rows


def _check_labels(op: str, labels: Tensor, num_classes: int, ignore_index: int) -> None:
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.numel():
        raise IndexError(
            f"{op}: label {int(wrong[0])} is out of bounds, expected 0 to {num_classes - 1}, "
            f"or {ignore_index} where there is none\n"
            "mend the labels, or give the model as many classes as they name"
        )


def plain_gradient(
    z: Tensor,
    tanh: Tensor | None,
    labels: Tensor,
    statistics: Tensor,
    z_weight: Tensor | None,
    ignore_index: int,
    shaping: Shaping,
) -> Tensor:
    """Return the gradient of the logits [N, V], undivided."""
    valid = (labels != ignore_index).unsqueeze(-1)
    zero_point, rest = statistics.unsqueeze(-1)
    w = valid.to(z.dtype)
    weight = w if z_weight is None else w + 2 * z_weight * (zero_point + rest)
    dz = torch.exp(z - zero_point - rest) * weight - w * (shaping.label_smoothing / z.shape[-1])
    dz.scatter_add_(-1, torch.where(valid, labels.unsqueeze(-1), 0), w * (shaping.label_smoothing - 1))
    if tanh is not None:
        dz = dz * (1 - tanh.square())
    dz = dz * shaping.scale
    return dz if shaping.reads_ignored_rows else torch.where(valid, dz, 0.0)


def columns_per_tile(num_columns: int, at_most: int) -> int:
    """Return the columns of one tile of a row: a power of two.

    >>> columns_per_tile(1, 4096), columns_per_tile(1000, 4096), columns_per_tile(128256, 4096)
    (8, 1024, 4096)
    """
    return max(LEAST_COLUMNS, min(at_most, next_power_of_two(num_columns)))


@jit
def shape_logits(b_logits, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return z, and tanh(scale * logits / softcap) if there is a softcap."""
    b_z = b_logits.to(tl.float32) * scale
    b_tanh = b_z
    if HAS_SOFTCAP:
        b_tanh = 2 * tl.sigmoid(2 * b_z / softcap) - 1
        b_z = softcap * b_tanh
    return b_z, b_tanh


@jit
def find_statistics(
    p_row,
    num_columns,
    num_readable,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Return max z and lse - max z of a row, and the sum of z if it is smoothed.

    Each group of VECTOR columns has a maximum and a sum of its own until the end: a thread reads whole groups, so no
    thread waits for another inside the loop. `num_readable` columns may be read; a multiple of 16 lets loads be wide.
    """
    b_group = tl.arange(0, BLOCK_COLUMNS // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    b_largest = tl.full([BLOCK_COLUMNS // VECTOR], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_COLUMNS // VECTOR], tl.float32)
    b_total = tl.zeros([BLOCK_COLUMNS // VECTOR], tl.float32)
    for start in range(0, num_columns, BLOCK_COLUMNS):
        b_columns = start + b_group
        b_logits = tl.load(p_row + b_columns, mask=b_columns < num_readable, other=0.0)
        b_z, _b_tanh = shape_logits(b_logits, scale, softcap, HAS_SOFTCAP)
        if HAS_SMOOTHING:
            b_total += tl.sum(tl.where(b_columns < num_columns, b_z, 0.0), 1)
        b_z = tl.where(b_columns < num_columns, b_z, float("-inf"))
        b_larger = tl.maximum(b_largest, tl.max(b_z, 1))
        b_zero_point = tl.where(b_larger == float("-inf"), 0.0, b_larger)  # -inf - -inf would be NaN
        b_terms = tl.exp2((b_z - b_zero_point[:, None]) * LOG2E)
        b_sum = b_sum * tl.exp2((b_largest - b_zero_point) * LOG2E) + tl.sum(b_terms, 1)
        b_largest = b_larger
    largest = tl.max(b_largest, 0)
    zero_point = tl.where(largest == float("-inf"), 0.0, largest)
    rest = tl.log(tl.sum(b_sum * tl.exp2((b_largest - zero_point) * LOG2E), 0))
    return zero_point, rest, tl.sum(b_total, 0)


@jit
def label_weight(label, ignore_index, num_columns):
    """Return 1; 0 for an ignored label, NaN for one that is no class."""
    is_class = (label >= 0) & (label < num_columns)
    return tl.where(label == ignore_index, 0.0, tl.where(is_class, 1.0, float("nan")))


@jit
def find_row_loss(
    p_row,
    label,
    ignore_index,
    zero_point,
    rest,
    total,
    num_columns,
    scale,
    softcap,
    label_smoothing,
    z_weight,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    """Return the loss of a row from its statistics."""
    is_class = (label >= 0) & (label < num_columns) & (label != ignore_index)
    target = tl.load(p_row + label, mask=is_class, other=float("nan"))
    z_target, _tanh = shape_logits(target, scale, softcap, HAS_SOFTCAP)
    loss = (zero_point - z_target) + rest
    if HAS_SMOOTHING:
        mean_loss = (zero_point - total / num_columns) + rest
        loss = (1 - label_smoothing) * loss + label_smoothing * mean_loss
    lse = zero_point + rest
    return tl.where(label == ignore_index, 0.0, loss) + z_weight * lse * lse


@jit
def find_gradient(
    b_logits,
    b_columns,
    label,
    weight,
    zero_point,
    rest,
    num_columns,
    scale,
    softcap,
    label_smoothing,
    z_weight,
    HAS_SOFTCAP: tl.constexpr,
):
    """Return the gradient of a tile of one row of logits, but for the factor `scale`; `weight` is w."""
    b_z, b_tanh = shape_logits(b_logits, scale, softcap, HAS_SOFTCAP)
    b_d = tl.exp2((b_z - zero_point - rest) * LOG2E) * (weight + 2 * z_weight * (zero_point + rest))
    b_d -= weight * (label_smoothing / num_columns)
    b_d = tl.where(b_columns == label, b_d - weight * (1 - label_smoothing), b_d)
    if HAS_SOFTCAP:
        b_d *= 1 - b_tanh * b_tanh
    return b_d
