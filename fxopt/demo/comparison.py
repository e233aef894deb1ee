"""Judge and show two runs of the same training, one as stock and one optimized."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fxopt.demo.training import Run
from fxopt.report.records import Report

FP32_TOLERANCE = 1e-5
HALF_FACTOR = 2
"""How much further from fp32 than stock the optimized run may be in half precision, in the median over the steps.

The median, since single steps say nothing: on batches of repeated tokens one rounding moves the loss by 1e-4 to 5e-3,
whichever op it is in (measured with each pattern left out in turn). Medians over 60 steps of llama in bf16: stock
1.5e-5, optimized 2.0e-5; largest steps 7e-5 and 6e-4.
"""
NUM_ROWS = 12
BAR_COLUMNS = 40


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A stock and an optimized run, and for bf16 and fp16 a stock run in fp32 to measure the rule by."""

    stock: Run
    optimized: Run
    reference: Run | None = None

    @property
    def difference(self) -> float:
        """In fp32 the largest relative difference of the two losses over all steps, else the median one to fp32."""
        if self.reference is None:
            return largest_difference(self.optimized, self.stock)
        return median_difference(self.optimized, self.reference)

    @property
    def tolerance(self) -> float:
        """What `difference` may be: 1e-5 in fp32, else a small multiple of stock's own to the fp32 run."""
        if self.reference is None:
            return FP32_TOLERANCE
        return HALF_FACTOR * median_difference(self.stock, self.reference)

    @property
    def rule(self) -> str:
        """The tolerance in words."""
        if self.reference is None:
            return f"at most {FP32_TOLERANCE:.0e} relative at every step, in fp32"
        return (
            f"at most {self.tolerance:.1e}, {HALF_FACTOR} x stock's own median difference to its run in fp32"
        )


def largest_difference(run: Run, other: Run) -> float:
    """Return the largest relative difference of the losses over all steps; NaN where one is NaN.

    >>> largest_difference(Run((2.0, 1.0), (), 0), Run((2.0, 1.25), (), 0))
    0.2
    """
    differences = relative_differences(run, other)
    return float("nan") if any(map(math.isnan, differences)) else max(differences)


def median_difference(run: Run, other: Run) -> float:
    """Return the median relative difference of the losses over all steps; NaN where one is NaN.

    >>> median_difference(Run((2.0, 1.0, 1.0), (), 0), Run((2.0, 1.25, 1.25), (), 0))
    0.2
    """
    differences = relative_differences(run, other)
    return float("nan") if any(map(math.isnan, differences)) else statistics.median(differences)


def relative_differences(run: Run, other: Run) -> list[float]:
    """Return the relative difference of the losses of each step."""
    return [abs(a - b) / abs(b) for a, b in zip(run.losses, other.losses, strict=True)]


def find_failures(comparison: Comparison, report: Report) -> list[str]:
    """Return what the demo fails for, one sentence each; empty when all holds."""
    failures: list[str] = []
    if not comparison.difference <= comparison.tolerance:
        failures.append(
            f"the losses differ by {comparison.difference:.1e} relative, expected {comparison.rule}"
        )
    num_fallbacks = sum(fallback.count for fallback in report.fallbacks)
    if num_fallbacks:
        failures.append(f"{num_fallbacks} calls fell back to the stock path, expected none: see the report")
    if not any(site.status == "rewritten" for site in report.sites):
        failures.append("no site was rewritten: see the report for the reasons")
    if comparison.optimized.saved_bytes > comparison.stock.saved_bytes:
        failures.append(
            f"the optimized model saves {comparison.optimized.saved_bytes:,} bytes for backward, "
            f"expected at most stock's {comparison.stock.saved_bytes:,}"
        )
    return failures


def show_comparison(console: Console, comparison: Comparison) -> None:
    """Print the loss curves and the figures of `comparison`."""
    stock, optimized = comparison.stock, comparison.optimized
    table = Table(title="Loss", title_justify="left", box=None, pad_edge=False)
    for heading in ("step", "stock", "optimized", "relative difference"):
        table.add_column(heading, justify="right")
    table.add_column("")
    finite = [loss for loss in stock.losses if math.isfinite(loss)] or [0.0]
    low, high = min(finite), max(finite)
    for step in _shown_steps(len(stock.losses)):
        loss, other = stock.losses[step], optimized.losses[step]
        filled = round(BAR_COLUMNS * (loss - low) / (high - low)) if high > low and math.isfinite(loss) else 0
        difference = abs(other - loss) / abs(loss)
        table.add_row(str(step + 1), f"{loss:.6f}", f"{other:.6f}", f"{difference:.1e}", "▇" * (filled + 1))
    console.print(table)
    console.print()

    table = Table(title="Figures", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for heading in ("stock", "optimized", "ratio"):
        table.add_column(heading, justify="right")
    for name, a, b, form in (
        ("median step, ms", stock.median_step_ms, optimized.median_step_ms, ".1f"),
        ("first step, ms (compiles)", stock.step_ms[0], optimized.step_ms[0], ".0f"),
        ("saved for backward, MiB", stock.saved_bytes / 2**20, optimized.saved_bytes / 2**20, ".1f"),
    ):
        table.add_row(name, f"{a:{form}}", f"{b:{form}}", f"{b / a:.2f}" if a else "-")
    console.print(table)
    console.print()
    console.print(
        f"Largest loss difference over {len(stock.losses)} steps: {largest_difference(optimized, stock):.1e}; "
        f"judged by {comparison.difference:.1e}, {comparison.rule}."
    )


def save_plot(path: Path, comparison: Comparison, title: str) -> None:
    """Write the loss curves and their relative difference to `path` as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = range(1, len(comparison.stock.losses) + 1)
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot(steps, comparison.stock.losses, label="stock", linewidth=4, alpha=0.4)
    upper.plot(steps, comparison.optimized.losses, label="optimized", linewidth=1.2, color="black")
    upper.set(ylabel="loss", title=title)
    upper.legend()
    differences = [
        abs(b - a) / abs(a) for a, b in zip(comparison.stock.losses, comparison.optimized.losses, strict=True)
    ]
    lower.set_yscale(
        "symlog", linthresh=1e-8
    )  # equal losses differ by 0, which a plain log scale cannot show
    lower.plot(steps, differences, label="measured")
    lower.axhline(comparison.tolerance, color="red", linestyle="--", linewidth=1, label="allowed")
    lower.set(xlabel="step", ylabel="relative difference")
    lower.legend(loc="center right")
    figure.savefig(path, dpi=120)


def _shown_steps(num_steps: int) -> list[int]:
    """Return up to `NUM_ROWS` indices spread evenly over all steps, the first and last among them."""
    if num_steps <= NUM_ROWS:
        return list(range(num_steps))
    return [round(row * (num_steps - 1) / (NUM_ROWS - 1)) for row in range(NUM_ROWS)]
