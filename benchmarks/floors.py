"""The floor of a training step: its products and its attention alone, on the GPU that is there.

    python -m benchmarks.floors                                    # of the shapes of the README's table
    python -m benchmarks.floors --steps steps.jsonl --out rows.json
    python -m benchmarks.floors --device cpu --tiny

`--steps` has measured steps, each a JSON object with `model`, `mode`, `bs`, `seq` and `ms` (and whatever else), one a
line, after anything on its line that is not JSON; each is given `floor_ms` and `over_floor`, its time over that. Run it
where the steps were measured, after them: a floor counts for one GPU in one state.

Each linear layer multiplies as often as its training needs: forward, for the gradient of its input and of its weight,
where these are wanted, all in bf16; which layers there are, and what they want, is seen in one forward pass on the meta
device. Products of adapters are left out, since they can be part of the base's, and so is the decoding of four bits.
Attention is torch's, forward and backward, by the fastest of its backends, causal, without windows and softcaps. All
of it runs in the order of a step, one launch behind the other, over buffers that exist already: nothing is computed
again, no memory is moved for anything else. A step cannot be much faster.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from benchmarks import stacks
from benchmarks.shapes import MODES, SHAPES, build, make_batch

WARM, TIMED = 3, 7
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
README = (
    ("qwen2.5-7b", "qlora", 2, 4096),
    ("qwen2.5-7b", "qlora", 1, 512),
    ("qwen2.5-7b", "qlora", 1, 16384),
    ("llama3.2-1b", "full", 2, 4096),
    ("olmo2-1b", "qlora", 2, 4096),
    ("gemma2-2b", "qlora", 2, 4096),
)


@dataclasses.dataclass(frozen=True)
class Product:
    """A linear layer: `rows` of `inner` items to `outer` ones, and which gradients are wanted."""

    rows: int
    inner: int
    outer: int
    of_input: bool
    of_weight: bool


@dataclasses.dataclass(frozen=True)
class Attention:
    """One call of attention: queries `[batch, heads, length, size]`, and so many heads of keys."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    size: int


Work = Product | Attention
Call = Callable[[], Any]


class _Recorder(TorchFunctionMode):
    """Notes the linear layers and the attention that run within it."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention, self.found = attention, list[Work]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight = args[:2]
            outer, inner = weight.shape
            if min(outer, inner) > stacks.RANK:  # adapters are narrower
                rows, wanted = x.numel() // inner, (x.requires_grad, weight.requires_grad)
                self.found.append(Product(rows, inner, outer, *wanted))
        elif func in (F.scaled_dot_product_attention, F.softmax):  # the second where a model writes its own
            self.found.append(self.attention)
        return func(*args, **(kwargs or {}))


def find_work(
    model: str, mode: str, batch: int, length: int, *, tiny: bool = False, layers: int | None = None
) -> list[Work]:
    """Return what a step of `model` has to compute at least, in the order of its forward pass."""
    dense = "full" if mode == "full" else "lora"
    made: Any = build(model, dense, "meta", tiny=tiny, layers=layers, length=length)
    # A mask of this form is handed on as it is: on the meta device nobody can look what it hides.
    mask = torch.ones(batch, 1, length, length, device="meta", dtype=torch.bool)
    config = made.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = Attention(batch, config.num_attention_heads, config.num_key_value_heads, length, size)
    with _Recorder(attention) as seen:
        made(**make_batch(made, length, "meta", batch), attention_mask=mask)
    calls, num_layers = seen.found.count(attention), config.num_hidden_layers
    assert calls == num_layers, (
        f"{model}: {calls} calls of attention, expected one in each of {num_layers} layers"
    )
    return seen.found


def measure_floor(work: Sequence[Work], device: str) -> dict[str, Any]:
    """Return the milliseconds of `work`, of its attention alone, and the backend of that."""
    gpu = device == "cuda"
    made: dict[Work, tuple[list[Call], list[Call], str]] = {}
    for each in dict.fromkeys(work):
        made[each] = (*_multiply(each, device), "") if isinstance(each, Product) else _attend(each, device)

    def time_of(wanted: Sequence[Work]) -> float:
        forward = [call for each in wanted for call in made[each][0]]
        backward = [call for each in reversed(wanted) for call in made[each][1]]
        return _time([*forward, *backward], gpu)

    attention = [each for each in work if isinstance(each, Attention)]
    backends = sorted({made[each][2] for each in attention})
    found = {"ms": time_of(work), "attention_ms": time_of(attention), "attention": ", ".join(backends)}
    made.clear()
    if gpu:  # so that the next model finds the GPU as this one did
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return found


def _multiply(work: Product, device: str) -> tuple[list[Call], list[Call]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=device, dtype=torch.bfloat16)

    x, weight, gradient = (
        draw(work.rows, work.inner),
        draw(work.outer, work.inner),
        draw(work.rows, work.outer),
    )
    y, dx, dw = torch.empty_like(gradient), torch.empty_like(x), torch.empty_like(weight)
    backward: list[Call] = []
    if work.of_input:
        backward.append(lambda: torch.mm(gradient, weight, out=dx))
    if work.of_weight:
        backward.append(lambda: torch.mm(gradient.t(), x, out=dw))
    return [lambda: torch.mm(x, weight.t(), out=y)], backward


def _attend(work: Attention, device: str) -> tuple[list[Call], list[Call], str]:
    shapes = [
        (work.batch, heads, work.length, work.size) for heads in (work.heads, work.kv_heads, work.kv_heads)
    ]
    q, k, v = (torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True) for s in shapes)

    def calls_of(backend: SDPBackend | None) -> tuple[Call, Call]:
        def forward() -> torch.Tensor:
            with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        y = forward()
        gradient = torch.randn_like(y)
        return forward, lambda: torch.autograd.grad(y, (q, k, v), gradient, retain_graph=True)

    if device != "cuda":
        forward, backward = calls_of(None)
        return [forward], [backward], "of a CPU"
    found: list[tuple[float, str, Call, Call]] = []
    for backend in BACKENDS:
        with contextlib.suppress(RuntimeError):  # it does not serve this form
            forward, backward = calls_of(backend)
            found.append((_time([forward, backward], gpu=True), backend.name, forward, backward))
    _, name, forward, backward = min(found, key=lambda each: each[0])
    return [forward], [backward], name


def _time(calls: Sequence[Call], gpu: bool) -> float:
    """Return the median milliseconds of all `calls`."""

    def once() -> float:
        if not gpu:
            started = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - started) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return statistics.median([once() for _ in range(WARM + TIMED)][WARM:])


def read_steps(text: str) -> Iterator[dict[str, Any]]:
    """Yield the measured steps of a log.

    >>> [row["ms"] for row in read_steps('warming up\\nRES{"ms": 2.5, "model": "m"}\\n{"error": "no"}')]
    [2.5]
    """
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line[line.index("{") :]) if "{" in line else {}
            if "ms" in row:
                yield row


def measure_rows(rows: Sequence[dict[str, Any]], device: str, *, tiny: bool) -> list[dict[str, Any]]:
    """Return `rows`, each with the floor of its step; those of one shape share one."""
    floors: dict[tuple[Any, ...], dict[str, Any]] = {}
    done: list[dict[str, Any]] = []
    for row in rows:
        # Whatever stands for four bits, the products are of bf16 values.
        key = row["model"], row["mode"] == "full", row["bs"], row["seq"], row.get("layers") or None
        if key not in floors:
            model, _, batch, length, layers = key
            work = find_work(model, row["mode"], batch, length, tiny=tiny, layers=layers)
            floors[key] = measure_floor(work, device)
        floor = floors[key]
        added = {"floor_ms": round(floor["ms"], 2), "floor_attention_ms": round(floor["attention_ms"], 2)}
        over = {"over_floor": round(row["ms"] / floor["ms"], 3)} if "ms" in row else {}
        done.append({**row, **added, "floor_attention": floor["attention"], **over})
    return done


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows with floors as a table in Markdown."""
    lines = [
        "| model | mode | tokens | stack | options | step ms | floor ms | of it attention | over the floor |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        step, over = (
            f"{row[name]:.{digits}f}" if name in row else "-"
            for name, digits in (("ms", 1), ("over_floor", 2))
        )
        options = f"`{row['opts']}`" if row.get("opts") else ""
        checkpointed = "checkpointed" if row.get("ckpt") else ""
        lines.append(
            f"| {row['model']} | {row['mode']} | {row['bs']} x {row['seq']} | {row.get('stack', '')} | "
            f"{' '.join(filter(None, (options, checkpointed)))} | {step} | {row['floor_ms']:.1f} | "
            f"{row['floor_attention_ms']:.1f} | {over} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure the floors of all rows, print the table, and write it where `--out` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=Path, help="a log with measured steps")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes of no size")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.floors: no CUDA device, expected one; --device cpu --tiny runs the same path on a CPU"
        )
        return 2
    rows: list[dict[str, Any]] = [
        dict(zip(("model", "mode", "bs", "seq"), shape, strict=True)) for shape in README
    ]
    if given.steps is not None:
        rows = list(read_steps(given.steps.read_text()))
    if given.tiny:
        rows = [{**row, "bs": 1, "seq": 64, "layers": 2} for row in rows]
    unknown = [row for row in rows if row["model"] not in SHAPES or row["mode"] not in MODES]
    if unknown:
        print(
            f"benchmarks.floors: expected models {', '.join(SHAPES)} in modes {', '.join(MODES)}, got {unknown[0]}"
        )
        return 2
    done = measure_rows(rows, given.device, tiny=given.tiny)
    print(render(done))
    if given.out is not None:
        result = {"machine": stacks.describe_machine(), "rows": done}
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
