"""Four-bit weights: table[code] * absmax of the value's block, the absmax itself possibly in eight bits.

value[i] = table[code i] * absmax[i // blocksize]; where `absmax` holds uint8 codes, it is decoded on the way:
absmax[j] = codebook[code j] * nested_absmax[j // 256] + offset. Codes stand two in a byte, the first in the high
half. Source: QLoRA (Dettmers et al., 2023), tables of NF4 and FP4 as bitsandbytes stores weights.
Numerics: each product and sum is rounded in fp32, no multiply-add is fused, then one rounding to the result's
dtype: the bits of bitsandbytes. Saved for backward: nothing; a weight decoded from codes has no gradient.

A decoded weight is as large as a dense one, so a backward pass that needs it decodes it again: the op is tagged so.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import can_launch, ceil_div, jit, next_power_of_two, on_device, register_op, tl
from fxopt.kernels.launcher import launch

NESTED_BLOCKSIZE = 256
TABLES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
        *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
        *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
    ),
}
"""The sixteen values of each type; all are float32 numbers."""

WORDS = 1024
"""Words of eight codes that a program decodes: at 128 threads eight loads of a word are in flight in each."""
NUM_WARPS = 4
TAIL_ROWS = 128
"""Rows of a weight beside which a program writes."""


@functools.cache
def table_of(quant_type: str, device: torch.device) -> Tensor:
    """Return the sixteen values on `device`, made once."""
    return torch.tensor(TABLES[quant_type], dtype=torch.float32, device=device)


def decode_absmax(
    absmax: Tensor, codebook: Tensor | None, nested_absmax: Tensor | None, offset: Tensor | None
) -> Tensor:
    """Return the scale of each block in fp32."""
    if codebook is None or nested_absmax is None or offset is None:
        return absmax
    scales = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    return codebook[absmax.reshape(-1).long()] * scales + offset


def plain_dequantize(
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return the decoded weight by plain torch: the specification, and what a CPU runs."""
    num_values = math.prod(shape)
    codes = packed.reshape(-1).view(torch.uint8)
    pairs = torch.stack((codes >> 4, codes & 15), dim=-1).reshape(-1)[:num_values]
    scales = decode_absmax(absmax, codebook, nested_absmax, offset).reshape(-1)
    whole = num_values // blocksize * blocksize
    values = table_of(quant_type, packed.device)[pairs.int()]
    values[:whole].view(-1, blocksize).mul_(scales[: whole // blocksize, None])
    values[whole:].mul_(scales[-1])
    return values.view(shape).to(dtype)


@jit
def write_tail(
    p_tail,
    p_out,
    first,
    num_rows,
    tail_start,
    tail_width,
    ROW_WORDS: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
):
    """Write what stands beside TAIL_ROWS rows of values: the tail from its first column on, zeros around it."""
    b_row = (first + tl.arange(0, TAIL_ROWS)).to(tl.int64)[:, None]
    b_column = tl.arange(0, BLOCK_TAIL)[None, :]
    b_from = b_column - tail_start
    b_inside = (b_row < num_rows) & (b_column < PADDING)
    b_mask = b_inside & (b_from >= 0) & (b_from < tail_width)
    b_tail = tl.load(p_tail + b_row * tail_width + b_from, mask=b_mask, other=0.0)
    b_at = b_row * (ROW_WORDS * 8 + PADDING) + ROW_WORDS * 8 + b_column
    tl.store(p_out + b_at, b_tail.to(p_out.dtype.element_ty), mask=b_inside)


@jit
def write_values(
    p_packed,
    p_absmax,
    p_codebook,
    p_nested,
    p_offset,
    p_table,
    p_out,
    program,
    num_values,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    HAS_NESTED: tl.constexpr,
    IN_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Write 8 * WORDS values; `p_packed` points at words of 32 bits, or at bytes where these are not aligned.

    A thread takes words that are WORDS / 8 apart, not four side by side as Triton would: its eight values are
    then one store of 16 bytes, next to its neighbour's, and nothing is exchanged between threads.
    """
    start = program.to(tl.int64) * WORDS
    num_left = num_values - start * 8
    b_at = tl.max_contiguous(tl.arange(0, WORDS), 1)
    b_k = tl.arange(0, 8)
    b_out_at = b_at[:, None] * 8 + b_k[None, :]
    b_out_mask = b_out_at < num_left
    if IN_WORDS:
        b_mask = b_at * 8 < num_left
        b_word = tl.load(p_packed + start + b_at, mask=b_mask, other=0)
        b_code = (b_word[:, None] >> ((b_k * 4) ^ 4)[None, :]) & 15
    else:
        b_mask = b_at * 8 < num_left
        b_byte = tl.load(p_packed + start * 4 + (b_out_at // 2), mask=b_out_mask, other=0).to(tl.int32)
        b_code = (b_byte >> (((b_k & 1) * 4) ^ 4)[None, :]) & 15
    first = start // (BLOCKSIZE // 8)
    b_block = b_at // (BLOCKSIZE // 8)
    b_scale = tl.load(p_absmax + first + b_block, mask=b_mask, other=0)
    if HAS_NESTED:
        b_nested = tl.load(p_nested + (first + b_block) // NESTED_BLOCKSIZE, mask=b_mask, other=0.0)
        b_scale = tl.load(p_codebook + b_scale.to(tl.int32)) * b_nested + tl.load(p_offset)
    # Sixteen words in sixteen banks of shared memory: whatever the codes of a warp, one access serves it. A tree
    # of fifteen selects per value would take longer than the memory does.
    b_table = tl.load(p_table + tl.arange(0, 16))
    b_value = tl.reshape(tl.gather(b_table, tl.reshape(b_code, (WORDS * 8,)), 0), (WORDS, 8))
    b_value = b_value * b_scale[:, None]
    if PADDING:
        # One division of 64 bits a program; within it a word is at most WORDS words on.
        row = start // ROW_WORDS
        b_row = ((start - row * ROW_WORDS).to(tl.int32) + b_at) // ROW_WORDS
        p_out += row * PADDING
        b_out_at += (b_row * PADDING)[:, None]
    tl.store(p_out + start * 8 + b_out_at, b_value.to(p_out.dtype.element_ty), mask=b_out_mask)


@jit
def dequantize_4bit_kernel(
    p_packed,
    p_absmax,
    p_codebook,
    p_nested,
    p_offset,
    p_table,
    p_tail,
    p_out,
    num_values,
    num_value_programs,
    num_rows,
    tail_start,
    tail_width,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    HAS_NESTED: tl.constexpr,
    IN_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
):
    """Write the values of a weight; with PADDING columns beside each row of ROW_WORDS words, these too."""
    program = tl.program_id(0)
    if PADDING and program >= num_value_programs:
        first = (program - num_value_programs) * TAIL_ROWS
        write_tail(
            p_tail,
            p_out,
            first,
            num_rows,
            tail_start,
            tail_width,
            ROW_WORDS,
            PADDING,
            BLOCK_TAIL,
            TAIL_ROWS,
        )
    else:
        write_values(
            p_packed,
            p_absmax,
            p_codebook,
            p_nested,
            p_offset,
            p_table,
            p_out,
            program,
            num_values,
            BLOCKSIZE,
            NESTED_BLOCKSIZE,
            HAS_NESTED,
            IN_WORDS,
            WORDS,
            ROW_WORDS,
            PADDING,
        )


def launch_dequantize(
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return the decoded weight by the kernel, in one launch."""
    out = packed.new_empty(shape, dtype=dtype)
    launch_into(out, packed, absmax, codebook, nested_absmax, offset, out.numel(), blocksize, quant_type)
    return out


def launch_into(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    in_width: int,
    blocksize: int,
    quant_type: str,
    tail: Tensor | None = None,
    tail_start: int = 0,
) -> None:
    """Write rows of `in_width` values into `out`, contiguous, by the kernel; where its rows are wider, what is beside.

    tail: [rows, columns], contiguous, written from column in_width + tail_start on; zeros stand around it.
    """
    if out.numel() == 0:
        return
    # A view of the storage, whatever dtype it is kept in.
    codes = packed.contiguous().view(-1).view(torch.uint8)
    in_words = codes.data_ptr() % 16 == 0 and codes.numel() % 4 == 0
    has_nested = codebook is not None
    padding = out.shape[-1] - in_width if out.shape[-1] > in_width else 0
    num_rows = out.shape[0] if padding else 1
    num_values = num_rows * in_width if padding else out.numel()
    num_programs = ceil_div(num_values, 8 * WORDS)
    with on_device(packed):
        launch(
            dequantize_4bit_kernel,
            (num_programs + (ceil_div(num_rows, TAIL_ROWS) if padding else 0),),
            codes.view(torch.int32) if in_words else codes,
            absmax,
            codebook if has_nested else absmax,
            nested_absmax if has_nested else absmax,
            offset if has_nested else absmax,
            table_of(quant_type, packed.device),
            out if tail is None else tail,
            out,
            num_values,
            num_programs,
            num_rows,
            tail_start,
            0 if tail is None else tail.shape[1],
            BLOCKSIZE=blocksize,
            NESTED_BLOCKSIZE=NESTED_BLOCKSIZE,
            HAS_NESTED=has_nested,
            IN_WORDS=in_words,
            WORDS=WORDS,
            ROW_WORDS=in_width // 8 if padding else 0,
            PADDING=padding,
            BLOCK_TAIL=next_power_of_two(padding),
            TAIL_ROWS=TAIL_ROWS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # bitsandbytes rounds the product before it adds the offset
        )


def decode_into(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    in_width: int,
    blocksize: int,
    quant_type: str,
    tail: Tensor | None = None,
    tail_start: int = 0,
) -> None:
    """Write the weight into the first `in_width` columns of `out`, contiguous, by the kernel or by plain torch.

    Wider rows hold `tail` from column in_width + tail_start on, and zeros around it.
    """
    nested = (codebook, nested_absmax, offset)
    scale = absmax if nested_absmax is None else nested_absmax
    is_whole = out.shape[1] == in_width or in_width % 8 == 0
    if packed.is_cuda and is_whole and can_launch(scale, tail, out_dtype=out.dtype):
        tail = None if tail is None else tail.contiguous()
        launch_into(out, packed, absmax, *nested, in_width, blocksize, quant_type, tail, tail_start)
        return
    shape = [out.shape[0], in_width]
    out[:, :in_width] = plain_dequantize(packed, absmax, *nested, shape, blocksize, quant_type, out.dtype)
    out[:, in_width:].zero_()
    if tail is not None:
        out[:, in_width + tail_start : in_width + tail_start + tail.shape[1]] = tail


def _fused(packed: Tensor, absmax: Tensor, *arguments: Any) -> Tensor:
    scale = arguments[1] if arguments[1] is not None else absmax
    can = can_launch(scale, out_dtype=arguments[-1])
    return (launch_dequantize if can else plain_dequantize)(packed, absmax, *arguments)


def _fake(packed: Tensor, absmax: Tensor, *arguments: Any) -> Tensor:
    return packed.new_empty(arguments[3], dtype=arguments[-1])


_op = register_op(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? codebook, Tensor? nested_absmax, Tensor? offset, "
    "int[] shape, int blocksize, str quant_type, ScalarType dtype) -> Tensor",
    plain=plain_dequantize,
    fused=_fused,
    fake=_fake,
    tags=(torch.Tag.pointwise,),
)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    shape: tuple[int, ...],
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight of `shape` that the codes in `packed` stand for, contiguous, in `dtype`.

    packed: bytes in any dtype, two codes in each. absmax: fp32, one of each block of `blocksize` values; or uint8
    codes into `codebook` (fp32 [256]), times `nested_absmax` (fp32, one of each 256 blocks), plus `offset` (fp32).

    >>> codes = torch.tensor([0x0F], dtype=torch.uint8)
    >>> options = dict(shape=(1, 2), blocksize=64, quant_type="nf4", dtype=torch.float32)
    >>> dequantize_4bit(codes, torch.tensor([2.0]), **options)
    tensor([[-2.,  2.]])
    """
    if quant_type not in TABLES:
        raise ValueError(f"dequantize_4bit: quant_type, expected one of {tuple(TABLES)}, got {quant_type!r}")
    if blocksize % 8 or blocksize < 8:
        raise ValueError(f"dequantize_4bit: blocksize, expected a multiple of 8, got {blocksize}")
    nested = (codebook, nested_absmax, offset)
    if any(given is None for given in nested) != all(given is None for given in nested):
        raise ValueError(
            "dequantize_4bit: expected codebook, nested_absmax and offset together, got some of them"
        )
    if (absmax.dtype == torch.uint8) != (codebook is not None):
        raise ValueError(f"dequantize_4bit: absmax, expected uint8 with a codebook only, got {absmax.dtype}")
    return _op(packed, absmax, codebook, nested_absmax, offset, list(shape), blocksize, quant_type, dtype)
