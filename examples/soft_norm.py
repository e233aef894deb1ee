"""The pattern of docs/adding_a_pattern.md in one file, and what it gains: `python examples/soft_norm.py`.

It times the norm alone and a model of four blocks, forward and backward: stock, compiled by torch, optimized by fxopt
without the pattern and with it. On a GPU that takes under a minute; with `--device cpu` the sizes are small, nothing is
compiled by fxopt and the op runs in plain torch, so that the times there say nothing of the kernel.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import nn
from torch.utils.benchmark import Timer

import fxopt

SECONDS = 0.3
"""Of runs that each time is the median of."""


class Block(nn.Module):
    """Divides by the root of a mean of sizes, where others take squares."""

    def __init__(self, width=64):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        """Run one pass."""
        wide = x.float()
        size = wide.abs().mean(-1, keepdim=True)
        y = self.gain * (wide * torch.rsqrt(size + 1e-5)).type_as(x)
        return x + self.down(torch.tanh(self.up(y)))


class Norm(nn.Module):
    """The norm of a block, by itself."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        """Run one pass."""
        wide = x.float()
        size = wide.abs().mean(-1, keepdim=True)
        return self.gain * (wide * torch.rsqrt(size + 1e-5)).type_as(x)


def soft_norm(x, gain, eps):
    """What to find."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.abs().mean(-1, keepdim=True) + eps)).to(x.dtype) * gain


@triton.jit
def soft_norm_kernel(p_x, p_gain, p_y, p_root, width, eps, BLOCK: tl.constexpr):
    """Write one row, and what it was divided by."""
    start, columns = tl.program_id(0).to(tl.int64) * width, tl.arange(0, BLOCK)
    inside = columns < width
    b_x = tl.load(p_x + start + columns, mask=inside, other=0.0)
    b_wide = b_x.to(tl.float32)
    root = 1 / tl.sqrt(tl.sum(tl.abs(b_wide)) / width + eps)
    b_normed = (b_wide * root).to(b_x.dtype).to(tl.float32)  # rounded where stock rounds
    b_gain = tl.load(p_gain + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(p_y + start + columns, (b_normed * b_gain).to(b_x.dtype), mask=inside)
    tl.store(p_root + tl.program_id(0), root)


def launch(x, gain, eps):
    """Return the norm and one number per row, by the kernel."""
    x, width = x.contiguous(), x.shape[-1]
    y, root = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    soft_norm_kernel[(root.numel(),)](x, gain, y, root, width, eps, BLOCK=triton.next_power_of_2(width))
    return y, root


@torch.library.custom_op("mine::soft_norm", mutates_args=())
def soft_norm_op(x: torch.Tensor, gain: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm and one number per row."""
    if x.is_cuda:
        return launch(x, gain, eps)
    root = torch.rsqrt(x.float().abs().mean(-1, keepdim=True) + eps)
    return (x.float() * root).to(x.dtype) * gain, root


@soft_norm_op.register_fake
def _(x, gain, eps):
    return torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


class SoftNorm(torch.autograd.Function):
    """Saves x, the gain and one number per row; stock saves three tensors of the size of x."""

    @staticmethod
    def forward(ctx, x, gain, eps):
        """Return the norm."""
        y, root = soft_norm_op(x, gain, eps)
        ctx.save_for_backward(x, gain, root)
        return y

    @staticmethod
    def backward(ctx, dy):
        """Return the gradients of x and of the gain."""
        x, gain, root = ctx.saved_tensors
        wide, d = x.float(), (dy * gain).float()
        slope = (d * wide).sum(-1, keepdim=True) * root**3 / (-2 * x.shape[-1])
        d_gain = (dy * (wide * root).to(x.dtype)).flatten(0, -2).sum(0)
        return (d * root + slope * wide.sign()).to(x.dtype), d_gain, None


MINE = fxopt.pattern(
    soft_norm,
    lambda x, gain, eps: SoftNorm.apply(x, gain, eps),
    examples=[(torch.randn(4, 16), torch.randn(16), 1e-5)],
)


def held_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes that a forward pass leaves in memory until backward, beside what it returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = model(x)
    return torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes()


def median_ms(run: Callable[[], object]) -> float:
    """Return the median ms of a call, the GPU waited for."""
    return Timer("run()", globals={"run": run}).blocked_autorange(min_run_time=SECONDS).median * 1e3


def measure(name: str, model: nn.Module, x: torch.Tensor) -> str:
    """Return a line of what one training pass of `model` on `x` takes and holds."""

    def train() -> None:
        model(x).backward(dy)

    dy = torch.randn_like(x)
    for _ in range(3):  # compiles, and leaves gradients to add to
        train()
    held = f"{held_bytes(model, x) / 2**20:10.1f} MiB" if x.is_cuda else ""
    forward, both = median_ms(lambda: model(x)), median_ms(train)
    return f"  {name:<24} {forward:8.3f} {both - forward:8.3f} {both:8.3f} {held}"


def main() -> None:
    """Print what each way takes, forward and backward."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    rows, width = ((8, 2048), 2048) if device.type == "cuda" else ((2, 32), 64)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    print(
        f"[{rows[0]}, {rows[1]}, {width}] in {dtype} on {where}; ms forward, backward, both; held for backward"
    )
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        "stock": lambda model: model,
        "torch.compile": torch.compile,
        "fxopt without it": lambda model: fxopt.optimize(model, cuda_graphs="off"),
        "fxopt with it": lambda model: fxopt.optimize(
            model, patterns=[*fxopt.patterns.ALL, MINE], cuda_graphs="off"
        ),
    }
    stocks = {"the norm": Norm(width), "four blocks": nn.Sequential(*(Block(width) for _ in range(4)))}
    for title, stock in stocks.items():
        print(title)
        stock = stock.to(device, dtype)
        x = torch.randn(*rows, width, device=device, dtype=dtype, requires_grad=True)
        for name, prepare in ways.items():
            torch.compiler.reset()
            model = prepare(copy.deepcopy(stock))
            print(measure(name, model, x), flush=True)
            if name == "fxopt with it":
                (found,) = {rewrite.pattern for rewrite in fxopt.explain(model).rewrites}
                assert found == MINE.name


if __name__ == "__main__":
    main()
