"""Project a full fine-tune under FSDP2 to 1 to 1024 GPUs, from one measured step and a stated interconnect.

    python -m benchmarks.projection [FOLDER]

prints the table, and with FOLDER writes `projection.md`, `projection.csv` and `projection.png` there. Nothing of it
is measured beyond one GPU: `ASSUMPTIONS` says what is taken for granted.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "training_h100.json"
GIB = 2**30
TOKENS, LENGTH = 2 * 4096, 4096
SIZES = tuple(2**power for power in range(11))

ASSUMPTIONS = (
    "Each GPU trains 2 x 4096 tokens (weak scaling), all parameters, bf16 compute and communication.",
    "Both stacks reach the products per second of the measured step (Llama-3.2-1B, 2 x 4096, one H100, "
    "`benchmarks/results/training_h100.json`, the median of its runs), whose time has an unsharded AdamW in it.",
    "Values kept for backward grow as layers x width from the measured step's: its peak less 8 bytes a parameter. What "
    "stock's logits take does not, and is understated.",
    "Where that does not fit 80 GiB, blocks keep their input alone, and a third of the products is done again.",
    "A parameter's fp32 value, gradient and two moments are sharded: 16 bytes over the number of GPUs. Embedding and "
    "head, and two blocks with one's gradients, are whole at a time, in bf16.",
    "A step gathers a block twice (forward, backward), embedding and head once, and reduces each gradient once.",
    "8 GPUs a node at 450 GB/s each way of NVLink a GPU, and 8 x 50 GB/s between nodes; 80 % of either is reached.",
    "Each collective has a latency of 20 us, and 5 us more for each doubling of the number of GPUs.",
    "Communication runs beside compute, but for the first block's gather and the last one's reduction.",
)
NVLINK, NODE, REACHED, PER_NODE = 450e9, 8 * 50e9, 0.8, 8
LATENCY, PER_DOUBLING = 20e-6, 5e-6
MEMORY = 80 * GIB


@dataclasses.dataclass(frozen=True)
class Shape:
    """What of a decoder decides time and bytes; `tied` where embedding and head are one tensor."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def block(self) -> int:
        """Parameters of one block."""
        keys = self.width * self.kv_heads // self.heads
        return 2 * self.width**2 + 2 * self.width * keys + 3 * self.width * self.inner + 2 * self.width

    @property
    def outside(self) -> int:
        """Parameters outside the blocks."""
        return self.vocabulary * self.width * (1 if self.tied else 2) + self.width

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.layers * self.block + self.outside

    @property
    def flops(self) -> float:
        """Floating point operations of one step's products on one GPU: two per weight and token, three times."""
        weights = self.layers * self.block + self.vocabulary * self.width
        attention = self.layers * self.width * LENGTH * 2  # causal: half of scores and values each
        return 3.0 * TOKENS * (2 * weights + attention)


MEASURED = Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 128256, tied=True)
SHAPES = (
    Shape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128256),
    Shape("70B", 80, 8192, 28672, 64, 8, 128256),
)
STACKS = {"fxopt": "fxopt", "stock": "hf"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One projected step: of `model` by `stack` on `gpus` GPUs."""

    model: str
    stack: str
    gpus: int
    step_ms: float
    exposed_ms: float
    tokens_per_s: float
    memory_gib: float
    recomputed: bool

    @property
    def fits(self) -> bool:
        """Whether the projected memory is within the device's."""
        return self.memory_gib * GIB <= MEMORY


def read_measured(stack: str) -> tuple[float, float]:
    """Return seconds and peak bytes of the measured step of `stack`: the medians of all its runs."""
    runs = json.loads(RESULTS.read_text())["runs"]
    rows: list[dict[str, Any]] = [row for run in runs for row in run["rows"]]
    mine = [
        row
        for row in rows
        if row["model"] == "llama3.2-1b" and row["mode"] == "full" and row["stack"] == stack
    ]
    mine = [row for row in mine if (row["bs"], row["seq"], row["ckpt"]) == (2, 4096, 0)]
    return (
        statistics.median(row["ms"] for row in mine) / 1e3,
        statistics.median(row["peak_gib"] for row in mine) * GIB,
    )


def transfer(parameters: int, gpus: int) -> float:
    """Return the seconds in which bf16 values of `parameters` are gathered, or reduced, over `gpus`."""
    if gpus == 1:
        return 0.0
    within = 2 * parameters * (1 - 1 / min(gpus, PER_NODE)) / (NVLINK * REACHED)
    nodes = max(1, gpus // PER_NODE)
    between = 2 * parameters * (1 - 1 / nodes) / (NODE * REACHED)
    return max(within, between) + LATENCY + PER_DOUBLING * (gpus.bit_length() - 1)


def project(shape: Shape, stack: str, gpus: int) -> Row:
    """Return the projected step of `shape` by `stack` on `gpus` GPUs."""
    seconds, peak = read_measured(STACKS[stack])
    compute = shape.flops * seconds / MEASURED.flops
    grown = shape.layers * shape.width / (MEASURED.layers * MEASURED.width)
    kept = (peak - 8 * MEASURED.parameters) * grown
    states = 16 * shape.parameters / gpus
    whole = 0 if gpus == 1 else 2 * (shape.outside + 3 * shape.block)
    recomputed = states + whole + kept > MEMORY
    if recomputed:
        compute *= 4 / 3
        kept = kept / shape.layers + 2 * TOKENS * shape.width * shape.layers
    reduce_or_gather = transfer(shape.block, gpus)
    outside = transfer(shape.outside, gpus)
    communication = 3 * shape.layers * reduce_or_gather + 2 * outside
    exposed = 2 * reduce_or_gather + max(0.0, communication - 2 * reduce_or_gather - compute)
    step = compute + exposed
    memory = (states + whole + kept) / GIB
    return Row(shape.name, stack, gpus, step * 1e3, exposed * 1e3, gpus * TOKENS / step, memory, recomputed)


def all_rows() -> Iterator[Row]:
    """Yield the rows of the table."""
    for shape in SHAPES:
        for gpus in SIZES:
            for stack in STACKS:
                yield project(shape, stack, gpus)


def render_table() -> str:
    """Return the table as Markdown; what does not fit has no time."""
    lines = [
        "| model | GPUs | stack | step, ms | of it waiting | tokens/s | GiB a GPU | blocks |",
        "|---" * 8 + "|",
    ]
    for row in all_rows():
        times = (
            f"{row.step_ms:.0f} | {row.exposed_ms:.0f} | {row.tokens_per_s:,.0f}" if row.fits else "- | - | -"
        )
        how = ("recomputed" if row.recomputed else "kept") if row.fits else "does not fit"
        lines.append(f"| {row.model} | {row.gpus} | {row.stack} | {times} | {row.memory_gib:.1f} | {how} |")
    return "\n".join(lines) + "\n"


def draw(path: Path) -> None:
    """Draw step time and memory over the number of GPUs into `path`."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(10, 4), layout="constrained")
    times, memory = figure.subplots(1, 2)
    rows = list(all_rows())
    for shape in SHAPES:
        for stack in STACKS:
            mine = [row for row in rows if row.model == shape.name and row.stack == stack]
            fitting = [row for row in mine if row.fits]
            label = f"{shape.name}, {stack}"
            times.plot([r.gpus for r in fitting], [r.step_ms for r in fitting], "o-", label=label)
            memory.plot([r.gpus for r in mine], [r.memory_gib for r in mine], "o-", label=label)
    memory.axhline(MEMORY / GIB, color="black", linestyle="--")
    for axes, title in ((times, "projected step, ms"), (memory, "projected memory a GPU, GiB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("GPUs")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    times.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the assumptions and the table, and write them and the plot where a folder is given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.projection", description=main.__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="where projection.md, .csv and .png go")
    folder: Path | None = parser.parse_args().folder
    text = "\n".join(f"- {line}" for line in ASSUMPTIONS) + "\n\n" + render_table()
    print(text)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "projection.md").write_text(text)
    with (folder / "projection.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in dataclasses.fields(Row)])
        writer.writerows(dataclasses.astuple(row) for row in all_rows())
    draw(folder / "projection.png")


if __name__ == "__main__":
    main()
