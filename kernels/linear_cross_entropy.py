"""Cross entropy of h W^T + b against labels, without the logits in memory, and its gradients.

    z     = softcap * tanh(scale * (h W^T + b) / softcap)   scale * (h W^T + b) without a softcap
    row   = (1 - smoothing) * (lse z - z[label]) + smoothing * (lse z - mean z) + z_loss * (lse z)^2
    loss  = sum of the rows whose label is not ignore_index / divisor
    divisor: the denominator if given, else the number of those rows for "mean", else 1

Source: `torch.nn.functional.linear` and `cross_entropy` as transformers' `ForCausalLMLoss` joins them.

Method: rows go through in chunks whose logits take at most `chunk_bytes`. Per chunk: one GEMM for the logits, one
kernel that writes the row losses and turns the logits in place into their gradient, then the GEMMs for the gradients of
h and W, accumulated. Gradients are so computed in forward, for the inputs that require them; backward only scales them.
Ignored rows are left out before the first GEMM. Their number is read by the host, which waits for the device once;
while a CUDA graph is captured they are computed instead, with gradient 0. Nothing else waits.

Saved for backward: the gradients: dh [N, H] and dW [V, H] in the dtype of h and W (dW in fp32 for fp16), db [V] in
fp32; and a divisor, fp32 [].

Numerics: logits are rounded to the dtype of h, as in stock models; the rest in fp32, the loss too. The divisor is
applied before the gradient of the logits is rounded, but for fp16: there small probabilities would vanish and sums
over rows overflow, so dlogits stay undivided (at most scale * (1 + 2 z_loss lse) in size), dW is summed in fp32 and
saved so, and backward divides together with the incoming gradient, where a loss scale comes in.
dW is summed over chunks in the dtype of W up to MOST_ROUNDED_SUMS chunks; beyond that in fp32, then rounded. (Error of
dW in bf16 over eager's own: 1.4 times at 4 rounded sums, 1.85 at 8, 2.45 at 16; 1.0 with sums in fp32.)
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import (
    can_launch,
    ceil_div,
    jit,
    next_power_of_two,
    num_warps_for,
    on_device,
    register_gradient,
    register_op,
    tl,
)

REDUCTIONS = ("mean", "sum")
CHUNK_BYTES = 512 * 2**20
ROW_MULTIPLE = 128  # GEMM tiles are full in chunks of whole multiples
MOST_ROUNDED_SUMS = 6


def linear_cross_entropy_reference(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    denominator: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Return the loss, differentiable, in plain torch: the specification."""
    valid = labels != ignore_index
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    z = torch.nn.functional.linear(h[valid], weight, bias).to(wide) * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    log_softmax = torch.log_softmax(z, -1)
    rows = -(1 - label_smoothing) * log_softmax.gather(-1, labels[valid].unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        rows = rows - label_smoothing * log_softmax.mean(-1)
    if z_loss:
        rows = rows + z_loss * z.logsumexp(-1).square()
    return rows.sum() / _divisor(labels, denominator, ignore_index, reduction == "mean", wide)


def _divisor(
    labels: Tensor, denominator: Tensor | None, ignore_index: int, mean: bool, dtype: torch.dtype
) -> Tensor:
    if denominator is not None:
        return denominator.detach().to(labels.device, dtype, copy=True).reshape(())
    if mean:
        return (labels != ignore_index).sum(dtype=dtype)
    return torch.ones((), dtype=dtype, device=labels.device)


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


def _plain_rows(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    divisor: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    with_gradient: bool,
) -> None:
    """Write the loss of each row to `losses`, and to `logits` their gradient."""
    valid = labels != ignore_index
    z = logits.to(losses.dtype) * scale
    tanh = torch.tanh(z / softcap) if softcap else None
    if tanh is not None:
        z = softcap * tanh
    index = torch.where(valid, labels, 0).unsqueeze(-1)
    log_softmax = torch.log_softmax(z, -1)
    lse = z.logsumexp(-1, keepdim=True)
    rows = (label_smoothing - 1) * log_softmax.gather(-1, index) + z_loss * lse.square()
    if label_smoothing:
        rows -= label_smoothing * log_softmax.mean(-1, keepdim=True)
    losses.copy_(torch.where(valid, rows.squeeze(-1), 0.0))
    if with_gradient:
        dz = log_softmax.exp() * (1 + 2 * z_loss * lse) - label_smoothing / z.shape[-1]
        dz.scatter_add_(-1, index, torch.full_like(lse, label_smoothing - 1))
        if tanh is not None:
            dz *= 1 - tanh.square()
        logits.copy_(torch.where(valid.unsqueeze(-1), dz * (scale / divisor), 0.0))


BLOCK_COLUMNS = 8192
SCALE_BLOCK = 4096
LOG2E = tl.constexpr(1.4426950408889634)


@jit
def _shape(b_logits, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return z, and tanh(scale * logits / softcap) if there is a softcap."""
    b_z = b_logits.to(tl.float32) * scale
    b_tanh = b_z
    if HAS_SOFTCAP:
        b_tanh = 2 * tl.sigmoid(2 * b_z / softcap) - 1
        b_z = softcap * b_tanh
    return b_z, b_tanh


@jit
def linear_cross_entropy_forward_kernel(
    p_logits,
    p_labels,
    p_losses,
    p_divisor,
    num_columns,
    ignore_index,
    scale,
    softcap,
    label_smoothing,
    z_loss,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write the loss of one row, and over its logits their gradient."""
    row = tl.program_id(0).to(tl.int64)
    p_logits += row * num_columns
    label = tl.load(p_labels + row)
    loss = 0.0
    if label != ignore_index:
        is_class = (label >= 0) & (label < num_columns)
        target = tl.load(p_logits + label, mask=is_class, other=float("nan"))
        z_target, _tanh = _shape(target, scale, softcap, HAS_SOFTCAP)
        largest = float("-inf")
        b_sum = tl.zeros([BLOCK_COLUMNS], tl.float32)
        b_total = tl.zeros([BLOCK_COLUMNS], tl.float32)
        for start in range(0, num_columns, BLOCK_COLUMNS):
            b_columns = start + tl.arange(0, BLOCK_COLUMNS)
            b_mask = b_columns < num_columns
            b_z, _b_tanh = _shape(
                tl.load(p_logits + b_columns, mask=b_mask, other=0.0), scale, softcap, HAS_SOFTCAP
            )
            if HAS_SMOOTHING:
                b_total += tl.where(b_mask, b_z, 0.0)
            b_z = tl.where(b_mask, b_z, float("-inf"))
            larger = tl.maximum(largest, tl.max(b_z, 0))
            zero_point = tl.where(larger == float("-inf"), 0.0, larger)  # -inf - -inf would be NaN
            b_sum = b_sum * tl.exp2((largest - zero_point) * LOG2E) + tl.exp2((b_z - zero_point) * LOG2E)
            largest = larger
        zero_point = tl.where(largest == float("-inf"), 0.0, largest)
        rest = tl.log(tl.sum(b_sum, 0))
        lse = zero_point + rest
        loss = (zero_point - z_target) + rest
        if HAS_SMOOTHING:
            mean_loss = (zero_point - tl.sum(b_total, 0) / num_columns) + rest
            loss = (1 - label_smoothing) * loss + label_smoothing * mean_loss
        loss += z_loss * lse * lse
        if WITH_GRADIENT:
            tl.debug_barrier()  # every thread has read the target's logit
            factor = scale / tl.load(p_divisor)
            num_blocks = tl.cdiv(num_columns, BLOCK_COLUMNS)
            for block in range(num_blocks):
                # Backwards: the end of the row was read last and is still in cache.
                b_columns = (num_blocks - 1 - block) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
                b_mask = b_columns < num_columns
                b_logits = tl.load(p_logits + b_columns, mask=b_mask, other=0.0)
                b_z, b_tanh = _shape(b_logits, scale, softcap, HAS_SOFTCAP)
                b_d = tl.exp2((b_z - zero_point - rest) * LOG2E) * (1 + 2 * z_loss * lse)
                b_d -= label_smoothing / num_columns
                b_d = tl.where(b_columns == label, b_d - (1 - label_smoothing), b_d)
                if HAS_SOFTCAP:
                    b_d *= 1 - b_tanh * b_tanh
                tl.store(p_logits + b_columns, (b_d * factor).to(p_logits.dtype.element_ty), mask=b_mask)
    elif WITH_GRADIENT:
        for start in range(0, num_columns, BLOCK_COLUMNS):
            b_columns = start + tl.arange(0, BLOCK_COLUMNS)
            b_zero = tl.zeros([BLOCK_COLUMNS], p_logits.dtype.element_ty)
            tl.store(p_logits + b_columns, b_zero, mask=b_columns < num_columns)
    tl.store(p_losses + row, loss)


@jit
def linear_cross_entropy_backward_kernel(
    p_gradient, p_dloss, p_divisor, p_scaled, num_elements, BLOCK: tl.constexpr
):
    """Write gradient * dloss / divisor."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    b_at = tl.arange(0, BLOCK)
    b_mask = b_at < num_elements - start
    factor = tl.load(p_dloss).to(tl.float32) / tl.load(p_divisor)
    b_gradient = tl.load(p_gradient + start + b_at, mask=b_mask, other=0.0).to(tl.float32)
    tl.store(p_scaled + start + b_at, (b_gradient * factor).to(p_scaled.dtype.element_ty), mask=b_mask)


def _fused_rows(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    divisor: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    with_gradient: bool,
) -> None:
    num_rows, num_columns = logits.shape
    block = min(BLOCK_COLUMNS, next_power_of_two(num_columns))
    linear_cross_entropy_forward_kernel[(num_rows,)](
        logits,
        labels,
        losses,
        divisor,
        num_columns,
        ignore_index,
        scale,
        softcap,
        label_smoothing,
        z_loss,
        HAS_SOFTCAP=softcap != 0,
        HAS_SMOOTHING=label_smoothing != 0,
        WITH_GRADIENT=with_gradient,
        BLOCK_COLUMNS=block,
        num_warps=num_warps_for(block),
        enable_fp_fusion=False,  # z must be the same number in both passes, or exp(z - lse) drifts
    )


def launch_forward(
    h: Tensor, weight: Tensor, labels: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return loss, the divisor left for backward, and the gradients needed, by the kernel."""
    with on_device(h), torch.autocast(h.device.type, enabled=False):
        return _forward_by_chunks(_fused_rows, h, weight, labels.contiguous(), *rest)


def launch_backward(
    dloss: Tensor,
    divisor: Tensor,
    dh: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients times dloss / divisor, new tensors of `dtype`, by the kernel."""
    with on_device(divisor):
        dh, dweight, dbias = (
            None if gradient is None else _launch_scale(gradient, dloss, divisor, dtype)
            for gradient in (dh, dweight, dbias)
        )
    return dh, dweight, dbias


def _launch_scale(gradient: Tensor, dloss: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    gradient = gradient.contiguous()
    scaled = gradient.new_empty(gradient.shape, dtype=dtype)
    if gradient.numel():
        linear_cross_entropy_backward_kernel[(ceil_div(gradient.numel(), SCALE_BLOCK),)](
            gradient,
            dloss,
            divisor,
            scaled,
            gradient.numel(),
            BLOCK=SCALE_BLOCK,
            num_warps=8,
            enable_fp_fusion=True,  # one product: nothing to fuse
        )
    return scaled


def _forward_by_chunks(
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
    chunk_bytes: int,
    need_h: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return loss, the divisor left for backward, and the gradients needed, undivided by it."""
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    vocabulary = weight.shape[0]
    divisor = _divisor(labels, denominator, ignore_index, mean, wide)
    divide_later = h.dtype == torch.float16
    one = torch.ones_like(divisor)
    row_divisor, later_divisor = (one, divisor) if divide_later else (divisor, one)

    kept = _find_valid_rows(labels, ignore_index)
    num_rows = labels.shape[0] if kept is None else kept.shape[0]
    rows = plan_chunk_rows(num_rows, vocabulary * h.element_size(), chunk_bytes)
    with_gradient = need_h or need_weight or need_bias
    sum_wide = divide_later or num_rows > rows * MOST_ROUNDED_SUMS

    dh = None
    if need_h:
        dh = h.new_empty(h.shape) if kept is None else h.new_zeros(h.shape)
    sum_dtype = wide if sum_wide else weight.dtype
    dweight = weight.new_empty(weight.shape, dtype=sum_dtype) if need_weight else None
    dbias = weight.new_zeros(vocabulary, dtype=wide) if need_bias else None
    if dweight is not None and num_rows == 0:
        dweight.zero_()
    losses = h.new_empty(num_rows, dtype=wide)
    buffer = h.new_empty((min(rows, num_rows), vocabulary))

    for start in range(0, num_rows, rows):
        end = min(start + rows, num_rows)
        part = slice(start, end) if kept is None else kept[start:end]
        h_part, labels_part, logits = h[part], labels[part], buffer[: end - start]
        if bias is None:
            torch.mm(h_part, weight.t(), out=logits)
        else:
            torch.addmm(bias, h_part, weight.t(), out=logits)
        run_rows(
            logits,
            labels_part,
            losses[start:end],
            row_divisor,
            ignore_index,
            scale,
            softcap,
            label_smoothing,
            z_loss,
            with_gradient,
        )
        if dh is not None:
            if isinstance(part, slice):
                torch.mm(logits, weight, out=dh[part])
            else:
                dh.index_copy_(0, part, torch.mm(logits, weight))
        if dweight is not None:
            _add_product(dweight, logits.t(), h_part, first=start == 0)
        if dbias is not None:
            dbias += logits.sum(0, dtype=wide)
    if dweight is not None and not divide_later:
        dweight = dweight.to(weight.dtype)
    return losses.sum() / divisor, later_divisor, dh, dweight, dbias


def _find_valid_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    """Return the indices of the rows to compute, or None for all of them."""
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    kept = (labels != ignore_index).nonzero().squeeze(1)
    return None if kept.shape[0] == labels.shape[0] else kept


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


def plain_forward(
    h: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return loss, the divisor left for backward, and the gradients needed, in plain torch."""
    with torch.autocast(h.device.type, enabled=False):
        return _forward_by_chunks(_plain_rows, h, *rest)


def plain_backward(
    dloss: Tensor,
    divisor: Tensor,
    dh: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients times dloss / divisor, new tensors of `dtype`, in plain torch."""
    factor = (dloss / divisor).to(divisor.dtype)
    dh, dweight, dbias = (
        None if gradient is None else (gradient.to(factor.dtype) * factor).to(dtype)
        for gradient in (dh, dweight, dbias)
    )
    return dh, dweight, dbias


def _fused_forward(
    h: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    return (launch_forward if can_launch(h, weight) else plain_forward)(h, weight, *rest)


def _fused_backward(
    dloss: Tensor,
    divisor: Tensor,
    dh: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    run = launch_backward if can_launch(divisor, out_dtype=dtype) else plain_backward
    return run(dloss, divisor, dh, dweight, dbias, dtype)


def _fake_forward(
    h: Tensor, weight: Tensor, labels: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    need_h, need_weight, need_bias = rest[-3:]
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    return (
        h.new_empty((), dtype=wide),
        h.new_empty((), dtype=wide),
        h.new_empty(h.shape) if need_h else None,
        weight.new_empty(weight.shape, dtype=wide if h.dtype == torch.float16 else None)
        if need_weight
        else None,
        weight.new_empty(weight.shape[0], dtype=wide) if need_bias else None,
    )


def _fake_backward(
    dloss: Tensor,
    divisor: Tensor,
    dh: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dh, dweight, dbias = (
        None if gradient is None else gradient.new_empty(gradient.shape, dtype=dtype)
        for gradient in (dh, dweight, dbias)
    )
    return dh, dweight, dbias


_forward_op = register_op(
    "linear_cross_entropy(Tensor h, Tensor weight, Tensor labels, Tensor? bias, Tensor? denominator, "
    "int ignore_index, bool mean, float scale, float softcap, float label_smoothing, float z_loss, "
    "int chunk_bytes, bool need_h, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    plain=plain_forward,
    fused=_fused_forward,
    fake=_fake_forward,
)
_backward_op = register_op(
    "linear_cross_entropy_backward(Tensor dloss, Tensor divisor, Tensor? dh, Tensor? dweight, Tensor? dbias, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    plain=plain_backward,
    fused=_fused_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.computed = inputs[-3:]


def _backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if dloss is None:
        return (None,) * 15
    h_weight_bias = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    for name, needed, computed in zip(("h", "weight", "bias"), h_weight_bias, ctx.computed, strict=True):
        if needed and not computed:
            raise RuntimeError(
                f"linear_cross_entropy: the gradient of {name} was not computed in forward, expected need_{name}=True"
            )
    dh, dweight, dbias = _backward_op(dloss, *ctx.saved_tensors, ctx.dtype)
    return dh, dweight, None, dbias, *(None,) * 11


register_gradient("linear_cross_entropy", _setup_context, _backward)


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    denominator: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the cross entropy of h weight^T + bias against `labels`: a scalar of `out_dtype`, fp32 by default.

    h: [N, H]; weight: [V, H]; bias: [V] or None; all of one float dtype; labels: [N], integers; denominator: one
    number, constant, or None; softcap 0: none; chunk_bytes: the most that logits may take at any time.

    >>> linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([1, -100]))
    tensor(1.3863)
    """
    if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1] or labels.shape != h.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: expected h [N, H], weight [V, H] and labels [N], "
            f"got {tuple(h.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if weight.dtype != h.dtype or (bias is not None and bias.dtype != h.dtype):
        raise ValueError(
            f"linear_cross_entropy: expected one dtype, got {h.dtype}, {weight.dtype}"
            + ("" if bias is None else f" and {bias.dtype}")
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction, expected one of {REDUCTIONS}, got {reduction!r}")
    if denominator is not None and denominator.requires_grad:
        raise ValueError("linear_cross_entropy: denominator requires grad, expected a constant")
    grad = torch.is_grad_enabled()
    loss = _forward_op(
        h,
        weight,
        labels,
        bias,
        denominator,
        ignore_index,
        reduction == "mean",
        scale,
        softcap,
        label_smoothing,
        z_loss,
        chunk_bytes,
        grad and h.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )[0]
    return loss if out_dtype is None else loss.to(out_dtype)
