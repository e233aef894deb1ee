"""dequantize_4bit: the kernel and the op against bitsandbytes, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxopt.kernels import dequantize_4bit as file
from fxopt.kernels.dequantize_4bit import dequantize_4bit, plain_dequantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(
    shape: tuple[int, ...], device: str, *, blocksize: int = 64, nested: bool = True, quant_type: str = "nf4"
) -> list[Any]:
    """Return the arguments of the op but for the dtype, with all codes in them."""
    generator = torch.Generator().manual_seed(0)
    size = torch.Size(shape).numel()
    num_blocks = -(-size // blocksize)
    packed = torch.randint(0, 256, (-(-size // 2), 1), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(num_blocks, generator=generator) + 0.01
    tensors: list[Any] = [absmax, None, None, None]
    if nested:
        codes = torch.randint(0, 256, (num_blocks,), dtype=torch.uint8, generator=generator)
        codebook = torch.linspace(-1, 1, 256)
        tensors = [codes, codebook, torch.rand(-(-num_blocks // 256), generator=generator), torch.tensor(0.3)]
    tensors = [packed, *tensors]
    return [*(t if t is None else t.to(device) for t in tensors), list(shape), blocksize, quant_type]


def exact(arguments: list[Any]) -> torch.Tensor:
    """Return the products in fp32, value by value: what any result is a rounding of."""
    packed, absmax, codebook, nested, offset, shape, blocksize, quant_type = arguments
    size = torch.Size(shape).numel()
    places = torch.arange(size, device=packed.device)
    codes = packed.reshape(-1)[places // 2].int() >> (4 * (1 - places % 2)) & 15
    block = places // blocksize
    scale = absmax[block]
    if codebook is not None:
        scale = codebook[scale.long()] * nested[block // 256] + offset
    table = torch.tensor(file.TABLES[quant_type], device=packed.device)
    return (table[codes] * scale).view(shape)


@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (3, 1000), (64, 512), (17, 4096)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_sizes(shape: tuple[int, ...], dtype: torch.dtype, nested: bool, device: str) -> None:
    arguments = make(shape, device, nested=nested)
    expect(file.launch_dequantize(*arguments, dtype), exact(arguments), dtype, device)
    assert torch.equal(plain_dequantize(*arguments, dtype), exact(arguments).to(dtype))


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_block_sizes(blocksize: int, quant_type: str, nested: bool, device: str) -> None:
    arguments = make((24, 1024), device, blocksize=blocksize, nested=nested, quant_type=quant_type)
    expect(file.launch_dequantize(*arguments, torch.float32), exact(arguments), torch.float32, device)
    assert torch.equal(plain_dequantize(*arguments, torch.float32), exact(arguments))


def expect(found: torch.Tensor, values: torch.Tensor, dtype: torch.dtype, device: str) -> None:
    """Check every bit; the interpreter cuts fp32 off to bf16 where a GPU rounds."""
    if dtype is torch.bfloat16 and device == "cpu":
        values = (values.view(torch.int32) & -65536).view(torch.float32)
    assert found.dtype == dtype
    assert torch.equal(found, values.to(dtype))


def test_codes_that_are_not_aligned_or_kept_in_another_dtype(device: str) -> None:
    arguments = make((8, 512), device)
    packed = arguments[0]
    shifted = torch.cat([packed[:1], packed])[1:]
    as_floats = packed.view(-1).view(torch.float32)
    assert shifted.data_ptr() % 16
    expected = exact(arguments)
    for codes in (shifted, as_floats):
        arguments[0] = codes
        assert torch.equal(file.launch_dequantize(*arguments, torch.float32), expected)
        assert torch.equal(plain_dequantize(*arguments, torch.float32), expected)


@pytest.mark.parametrize("shape", [(1, 64), (3, 1000), (130, 264), (17, 4096)], ids=str)
@pytest.mark.parametrize(("padding", "tail_start", "tail_width"), [(16, 0, 16), (48, 16, 8), (32, 0, 0)])
def test_rows_with_a_tail(
    shape: tuple[int, int], padding: int, tail_start: int, tail_width: int, device: str
) -> None:
    arguments = make(shape, device)
    tail = torch.randn(shape[0], tail_width, device=device) if tail_width else None
    expected = torch.zeros(shape[0], shape[1] + padding, device=device)
    expected[:, : shape[1]] = exact(arguments)
    if tail is not None:
        expected[:, shape[1] + tail_start : shape[1] + tail_start + tail_width] = tail
    tensors, coding = arguments[:5], arguments[6:]
    for write in (file.launch_into, file.decode_into):
        out = torch.empty_like(expected)
        write(out, *tensors, shape[1], *coding, tail, tail_start)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("blocksize", [64, 128, 512, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_bitsandbytes(
    blocksize: int, quant_type: str, nested: bool, dtype: torch.dtype, op_device: str
) -> None:
    bnb: Any = pytest.importorskip("bitsandbytes.functional")
    for shape in ((64, 512), (40, 264)):
        weight = torch.randn(shape, device=op_device, dtype=dtype)
        packed, state = bnb.quantize_4bit(
            weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
        )
        inner = (state.state2.code, state.state2.absmax, state.offset) if nested else ()
        found = dequantize_4bit(
            packed, state.absmax, *inner, shape=shape, blocksize=blocksize, quant_type=quant_type, dtype=dtype
        )
        assert torch.equal(found, bnb.dequantize_4bit(packed, state))


def test_the_op_is_registered_as_torch_wants_it(op_device: str, opcheck: Any) -> None:
    for nested in (True, False):
        arguments = make((8, 64), op_device, nested=nested)
        opcheck(torch.ops.fxopt.dequantize_4bit.default, (*arguments, torch.bfloat16))


def test_arguments_are_checked() -> None:
    packed, absmax, *_ = make((8, 64), "cpu", nested=False)
    options: dict[str, Any] = dict(shape=(8, 64), blocksize=64, quant_type="nf4", dtype=torch.float32)
    with pytest.raises(ValueError, match="quant_type, expected one of"):
        dequantize_4bit(packed, absmax, **options | {"quant_type": "int4"})
    with pytest.raises(ValueError, match="expected a multiple of 8"):
        dequantize_4bit(packed, absmax, **options | {"blocksize": 12})
    with pytest.raises(ValueError, match="together, got some"):
        dequantize_4bit(packed, absmax, absmax, **options)
    with pytest.raises(ValueError, match="uint8 with a codebook only"):
        dequantize_4bit(packed, absmax.to(torch.uint8), **options)
