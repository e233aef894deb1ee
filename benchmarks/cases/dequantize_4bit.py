"""Sizes and contestants of `dequantize_4bit`."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases.case import Case, Function
from fxopt.kernels.dequantize_4bit import dequantize_4bit, plain_dequantize

SHAPES = ((3584, 3584), (18944, 3584), (2048, 8192))
BLOCKSIZE = 64
BF16 = torch.bfloat16


def find_bitsandbytes() -> Any | None:
    try:
        import bitsandbytes.functional as functional  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return functional


def make_cases() -> list[Case]:
    """Return the weights timed: of Qwen2.5-7B and Llama-3.2-1B, their absmax in eight bits, and one in fp32."""
    cases = [make_case(shape, "nf4", nested=True) for shape in SHAPES]
    return [*cases, make_case(SHAPES[1], "nf4", nested=False), make_case(SHAPES[1], "fp4", nested=True)]


def make_case(shape: tuple[int, int], quant_type: str, *, nested: bool) -> Case:
    """Return the case of one weight; the codes are read and the decoded weight is written."""
    size = shape[0] * shape[1]
    num_blocks = size // BLOCKSIZE
    scales = torch.rand(num_blocks // 256, device="cuda") + 0.1
    codebook, offset = torch.linspace(-1, 1, 256, device="cuda"), torch.tensor(0.5, device="cuda")
    flat = torch.rand(num_blocks, device="cuda") + 0.1

    def make(rows: int) -> list[torch.Tensor]:
        packed = torch.randint(0, 256, (size // 2, 1), dtype=torch.uint8, device="cuda")
        return [packed, torch.randint(0, 256, (num_blocks,), dtype=torch.uint8, device="cuda")]

    def arguments(packed: torch.Tensor, codes: torch.Tensor) -> tuple[Any, Any, Any, Any, Any]:
        return (packed, codes, codebook, scales, offset) if nested else (packed, flat, None, None, None)

    def fxopt(packed: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = dict(shape=shape, blocksize=BLOCKSIZE, quant_type=quant_type, dtype=BF16)
        return dequantize_4bit(*arguments(packed, codes), **options)

    def eager(packed: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return plain_dequantize(*arguments(packed, codes), list(shape), BLOCKSIZE, quant_type, BF16)

    contestants: dict[str, Function] = {"fxopt": fxopt, "eager": eager}
    functional = find_bitsandbytes()
    if functional is not None:
        table = functional.get_4bit_type(quant_type, device="cuda")
        options: dict[str, Any] = dict(shape=torch.Size(shape), code=table, blocksize=BLOCKSIZE)
        state = functional.QuantState(None, quant_type=quant_type, dtype=BF16, **options)
        if nested:
            inner = functional.QuantState(scales, code=codebook, blocksize=256, dtype=torch.float32)
            state.offset, state.state2, state.nested = offset, inner, True

        def bnb(packed: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
            state.absmax = codes if nested else flat
            return functional.dequantize_4bit(packed, state)

        contestants["bnb"] = bnb
    num_bytes = size // 2 + num_blocks * (1 if nested else 4) + size * 2
    name = f"{shape[0]} x {shape[1]} {quant_type}{'' if nested else ', fp32 absmax'}"
    return Case("dequantize_4bit", name, make, contestants, num_bytes)
