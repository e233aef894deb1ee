"""Whole mixtures of experts, forward and backward, on fxopt against transformers' own grouped products.

    python -m benchmarks.experts --out experts.json
    python -m benchmarks.experts --tokens 64 --divide 64 --steps 2 --out experts.json      # on a CPU

A layer is transformers' own module (router, experts, shared experts) in the shape of Mixtral 8x7B or of DeepSeek-V3,
8192 tokens in bf16; one process measures all contestants on the same weights and the same input:

    grouped_mm   transformers' experts as grouped products, as it runs them by default
    compile      the same under torch.compile
    fxopt        the same under fxopt.optimize, its kernels launched one by one

Times are medians of steps after `WARM_UP`, from the start of a step to its last kernel, forward and backward apart.
`peak` is what a step allocates beyond weights and input, gradients included. `difference` is how far result and
gradients are off `grouped_mm`, the largest ratio of norms: both round to bf16, in other places. With `--frozen` the
experts are not trained, as under adapters elsewhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import stacks

SHAPES: dict[str, tuple[str, str, dict[str, int]]] = {
    "mixtral": (
        "MixtralConfig",
        "MixtralSparseMoeBlock",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3MoE",
        {
            "hidden_size": 7168,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
        },
    ),
}
"""Of each layer the classes of its config and its module, and the sizes that its published weights have."""
DIVIDED = ("hidden_size", "intermediate_size", "moe_intermediate_size")
TOKENS, WARM_UP, STEPS, SPREAD = 8192, 3, 10, 0.02
CONTESTANTS = ("grouped_mm", "compile", "fxopt")


class Layer(nn.Module):
    """One mixture as the only block of a model, so that fxopt finds it as it finds any block."""

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([mixture])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the mixture makes of `x`."""
        for block in self.blocks:
            x = block(x)
        return x


def make_layer(shape: str, device: str, divide: int = 1, *, frozen: bool = False) -> Layer:
    """Return the layer of `shape`, of random weights in bf16, its widths divided by `divide`."""
    import importlib

    import transformers

    config_name, module_name, fields = SHAPES[shape]
    small = {name: size // divide if name in DIVIDED else size for name, size in fields.items()}
    config = getattr(transformers, config_name)(**small)
    config._experts_implementation = "grouped_mm"
    modeling = importlib.import_module(f"transformers.models.{shape}.modeling_{shape}")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            layer = Layer(getattr(modeling, module_name)(config)).train()
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=SPREAD)
            parameter.requires_grad_(not (frozen and parameter.ndim == 3))
    return layer


class Clock:
    """The ms between marks, on a GPU by its own events."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Note this moment."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def spans(self) -> list[float]:
        """Return the ms from each mark to the next."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.on_gpu:
            torch.cuda.synchronize()
            return [first.elapsed_time(second) for first, second in pairs]
        return [(second - first) * 1e3 for first, second in pairs]


def run_step(
    run: Callable[..., torch.Tensor], layer: nn.Module, x: torch.Tensor, seed: torch.Tensor
) -> Clock:
    """Run forward and backward of one step, gradients made anew."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    clock = Clock(x.device.type)
    clock.mark()
    y = run(x)
    clock.mark()
    y.backward(seed)
    clock.mark()
    return clock


def measure(
    name: str, layer: Layer, x: torch.Tensor, seed: torch.Tensor, steps: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the figures of one contestant, and its result and gradients, on the host."""
    import fxopt

    run: Callable[..., torch.Tensor] = layer
    if name == "compile":
        run = torch.compile(layer, dynamic=False)  # pyright: ignore[reportUnknownMemberType]
    if name == "fxopt":
        fxopt.optimize(layer, cuda_graphs="off")
    start = time.perf_counter()
    spans: list[list[float]] = []
    on_gpu = x.device.type == "cuda"
    before = 0
    for step in range(WARM_UP + steps):
        if on_gpu and step in (1, WARM_UP):  # the first step compiles, which allocates
            layer.zero_grad(set_to_none=True)
            x.grad = None
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        spans.append(run_step(run, layer, x, seed).spans())
        if step == 0:
            first_s = time.perf_counter() - start
    timed = spans[WARM_UP:]
    figures: dict[str, Any] = {
        "forward_ms": round(statistics.median(forward for forward, _ in timed), 3),
        "backward_ms": round(statistics.median(backward for _, backward in timed), 3),
        "step_ms": round(statistics.median(map(sum, timed)), 3),
        "least_ms": round(min(map(sum, timed)), 3),
        "first_step_s": round(first_s, 1),
    }
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
        figures |= {"peak_gib": gib(peak - before), "peak_with_weights_gib": gib(peak)}
    layer.zero_grad(set_to_none=True)
    x.grad = None
    y = run(x)
    y.backward(seed)
    assert x.grad is not None
    found = {"y": y.detach().cpu(), "x": x.grad.cpu()}
    found |= {
        path: sample(parameter.grad)
        for path, parameter in layer.named_parameters()
        if parameter.grad is not None
    }
    if name == "fxopt":
        report = fxopt.explain(layer)
        sites = [site for site in report.sites if site.pattern == "experts"]
        figures["experts"] = [f"{site.status}: {site.reason or site.op}" for site in sites]
        figures["fallbacks"] = sum(each.count for each in report.fallbacks)
        fxopt.restore(layer)
    return figures, found


def sample(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient on the host, of a stack's matrices the first eight."""
    return (gradient[:8] if gradient.ndim == 3 else gradient).cpu()


def gib(num_bytes: int) -> float:
    """Return bytes in GiB."""
    return round(num_bytes / 2**30, 3)


def difference(found: dict[str, torch.Tensor], stock: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Return the largest distance from stock's values, as a ratio of norms, and whose it is."""
    ratios = {
        name: float(
            (found[name].float() - value.float()).norm() / value.float().norm().clamp(min=torch.finfo().tiny)
        )
        for name, value in stock.items()
    }
    worst = max(ratios, key=lambda name: ratios[name])
    return round(ratios[worst], 5), worst


def measure_shape(shape: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of all contestants on one layer; one that fails is a row with its error."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = make_layer(shape, device, given.divide, frozen=given.frozen)
    width = SHAPES[shape][2]["hidden_size"] // given.divide
    torch.manual_seed(1)
    x = torch.randn(1, given.tokens, width, device=device).bfloat16().requires_grad_()
    seed = torch.randn(1, given.tokens, width, device=device).bfloat16()
    row: dict[str, Any] = {"shape": shape, "tokens": given.tokens, "frozen": given.frozen}
    stock: dict[str, torch.Tensor] = {}
    for name in given.contestants.split(","):
        try:
            row[name], found = measure(name, layer, x, seed, given.steps)
        except Exception as error:
            row[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        else:
            stock = stock or found
            row[name]["difference"], row[name]["difference_of"] = difference(found, stock)
        if device == "cuda":
            torch.cuda.empty_cache()
        print(json.dumps({"shape": shape, "contestant": name, **row[name]}), flush=True)
    return row


def main(argv: list[str] | None = None) -> int:
    """Measure the layers and write one JSON; 1 where a contestant failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--divide", type=int, default=1, help="make the widths this many times smaller")
    parser.add_argument("--frozen", action="store_true", help="do not train the experts")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    given = parser.parse_args(argv)
    rows = [measure_shape(shape, given) for shape in given.shapes.split(",")]
    if given.out is not None:
        result = {"machine": stacks.describe_machine(), "rows": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any("error" in row.get(name, {}) for row in rows for name in given.contestants.split(",")))


if __name__ == "__main__":
    raise SystemExit(main())
