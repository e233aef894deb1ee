"""Dropout of which one bit an item is kept: what it leaves is computed again from its input and the bits.

    y = x * kept / (1 - p)        kept: drawn by torch's own dropout, the same items as stock's

Source: dropout before an adapter, as in peft `lora.Linear`.
Saved for backward: `kept`, eight items a byte, in the order of x laid out densely; x is the caller's.
Numerics: torch's own, bit for bit: on a CPU a product with `kept / (1 - p)` in the dtype of x, on a GPU a product with
1 / (1 - p) in fp32.

Draws of one graph are chained by `after`, so that no compiler changes their order or takes two for one.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.launch import (
    can_launch,
    ceil_div,
    jit,
    on_device,
    register_gradient,
    register_op,
    tl,
    wide_dtype,
)
from fxopt.kernels.launcher import launch

BITS = 8
BLOCK_BYTES = 512
BLOCK = 4096
NUM_WARPS = 8


@jit
def pack_bits_kernel(p_kept, p_packed, num_items, BLOCK_BYTES: tl.constexpr):
    """Write BLOCK_BYTES bytes, each of eight items that are 0 or 1, the first one lowest."""
    b_byte = tl.program_id(0).to(tl.int64) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    b_bit = tl.arange(0, 8)[None, :]
    b_at = b_byte[:, None] * 8 + b_bit
    b_kept = tl.load(p_kept + b_at, mask=b_at < num_items, other=0).to(tl.int32)
    b_packed = tl.sum(b_kept << b_bit, axis=1)
    tl.store(p_packed + b_byte, b_packed.to(tl.uint8), mask=b_byte * 8 < num_items)


@jit
def drop_items_kernel(p_x, p_packed, p_y, num_items, scale, BLOCK: tl.constexpr):
    """Write BLOCK items of x, times their bits, times scale."""
    b_at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_mask = b_at < num_items
    b_byte = tl.load(p_packed + b_at // 8, mask=b_mask, other=0).to(tl.int32)
    b_kept = ((b_byte >> (b_at % 8).to(tl.int32)) & 1).to(tl.float32)
    b_x = tl.load(p_x + b_at, mask=b_mask, other=0.0).to(tl.float32)
    tl.store(p_y + b_at, (b_x * b_kept * scale).to(p_y.dtype.element_ty), mask=b_mask)


def pack_bits(kept: Tensor) -> Tensor:
    """Return the items of `kept`, each 0 or 1, eight a byte, in plain torch."""
    items = kept.reshape(-1).to(torch.uint8)
    items = F.pad(items, (0, -items.numel() % BITS)).view(-1, BITS)
    places = torch.arange(BITS, dtype=torch.uint8, device=kept.device)
    return (items << places).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return a bool tensor of `shape` whose items `packed` holds.

    >>> unpack_bits(pack_bits(torch.tensor([True, False, True])), torch.Size([3]))
    tensor([ True, False,  True])
    """
    places = torch.arange(BITS, dtype=torch.uint8, device=packed.device)
    items = (packed[:, None] >> places) & 1
    return items.view(-1)[: shape.numel()].view(shape).bool()


def launch_pack_bits(kept: Tensor) -> Tensor:
    """Return what `pack_bits` returns, by the kernel; `kept` is a bool tensor, dense."""
    packed = kept.new_empty(ceil_div(kept.numel(), BITS), dtype=torch.uint8)
    grid = (ceil_div(packed.numel(), BLOCK_BYTES),)
    with on_device(kept):
        launch(
            pack_bits_kernel,
            grid,
            kept.view(torch.uint8),
            packed,
            kept.numel(),
            BLOCK_BYTES=BLOCK_BYTES,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return packed


def launch_drop_items(x: Tensor, packed: Tensor, scale: float) -> Tensor:
    """Return x * kept * scale, dense, by the kernel."""
    x = x.contiguous()
    y = x.new_empty(x.shape)
    with on_device(x):
        launch(
            drop_items_kernel,
            (ceil_div(x.numel(), BLOCK),),
            x,
            packed,
            y,
            x.numel(),
            scale,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # bit for bit torch's own products
        )
    return y


def _plain_forward(x: Tensor, p: float, after: Tensor | None) -> tuple[Tensor, Tensor]:
    kept = torch.empty_like(x).bernoulli_(1 - p)
    packed = pack_bits(kept)
    return (x * kept.div_(1 - p)).contiguous(), packed


def _plain_drop(x: Tensor, packed: Tensor, p: float) -> Tensor:
    return (x * unpack_bits(packed, x.shape).to(x.dtype).div_(1 - p)).contiguous()


def _fused_forward(x: Tensor, p: float, after: Tensor | None) -> tuple[Tensor, Tensor]:
    y, kept = torch.native_dropout(x, p, True)
    pack = launch_pack_bits if can_launch(x) else pack_bits
    return y.contiguous(), pack(kept.contiguous())


def _fused_drop(x: Tensor, packed: Tensor, scale: float) -> Tensor:
    if can_launch(x):
        return launch_drop_items(x, packed, scale)
    wide = wide_dtype(x.dtype)
    return (x.to(wide) * unpack_bits(packed, x.shape) * scale).to(x.dtype).contiguous()


def _forward_scale(x: Tensor, p: float) -> float:
    """Return what torch's forward kernel multiplies by: 1 / (1 - p), divided in the dtype that it computes in."""
    if x.dtype == torch.float64:
        return 1 / (1 - p)
    return ctypes.c_float(1 / ctypes.c_float(1 - p).value).value


def _fake_forward(x: Tensor, p: float, after: Tensor | None) -> tuple[Tensor, Tensor]:
    num_bytes = (x.numel() + BITS - 1) // BITS
    return x.new_empty(x.shape), x.new_empty((num_bytes,), dtype=torch.uint8)


def _fake_drop(x: Tensor, packed: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape)


_forward_op = register_op(
    "dropout(Tensor x, float p, Tensor? after) -> (Tensor, Tensor)",
    plain=_plain_forward,
    fused=_fused_forward,
    fake=_fake_forward,
    tags=(torch.Tag.nondeterministic_seeded,),
)
register_op(
    "dropout_output_0(Tensor x, Tensor output_1, float p) -> Tensor",
    plain=_plain_drop,
    fused=lambda x, packed, p: _fused_drop(x, packed, _forward_scale(x, p)),
    fake=_fake_drop,
)
_backward_op = register_op(
    "dropout_backward(Tensor dy, Tensor packed, float p) -> Tensor",
    plain=_plain_drop,
    fused=lambda dy, packed, p: _fused_drop(dy, packed, 1 / (1 - p)),
    fake=_fake_drop,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.p = inputs[1]


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    return _backward_op(dy, *ctx.saved_tensors, ctx.p), None, None


_apply = register_gradient("dropout", _forward_op, _setup_context, _backward)


def dropout(x: Tensor, p: float, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return x with items dropped as `torch.dropout` drops them, dense, and which were kept, eight a byte.

    x: any shape, any float dtype, some items; 0 < p < 1; after: what another call returned second, to come before.

    >>> x = torch.ones(4)
    >>> y, packed = dropout(x, 0.5)
    >>> y.equal(x * unpack_bits(packed, x.shape) * 2)
    True
    """
    return _apply(x, p, after)
