"""The main job: train a small model on real English twice, as stock and optimized, and compare."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fxopt
from fxopt.demo.comparison import Comparison, find_failures, save_plot, show_comparison
from fxopt.demo.corpus import make_batches, read_corpus, train_tokenizer
from fxopt.demo.models import build_small_model
from fxopt.demo.plot_file import check_plot_file
from fxopt.demo.training import DTYPES, Run, train
from fxopt.errors import FxoptError

SEED = 0
VOCABULARY_SIZE = 4096
BATCH_SIZE = 4
LENGTH = 128
NUM_LINES = 6
"""Into a file, where no bar moves, each training says so often how far it is."""


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """What a user of the demo may change."""

    device: str = "cpu"
    steps: int = 60
    arch: str = "llama"
    dtype: str = "fp32"
    out: Path = Path("fxopt-demo.png")


def run_demo(options: DemoOptions, console: Console, show_report: Callable[[str], None]) -> list[str]:
    """Run the demo, print what it finds, and return what failed, one sentence each.

    Raises:
        FxoptError: an option that cannot be served, before any training.
    """
    check_options(options)
    text = read_corpus()
    tokenizer = train_tokenizer(text, VOCABULARY_SIZE)
    tokens = torch.tensor(tokenizer.encode(text).ids)
    torch.manual_seed(SEED)
    model = build_small_model(options.arch, VOCABULARY_SIZE).to(options.device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{type(model).__name__}, {num_parameters / 1e6:.1f} M parameters, {options.dtype} on {options.device}; "
        f"{len(text):,} characters of Python's manual in {len(tokens):,} tokens; "
        f"{options.steps} steps of {BATCH_SIZE} x {LENGTH} tokens, seed {SEED}"
    )
    batches = make_batches(tokens, num_batches=options.steps, batch_size=BATCH_SIZE, length=LENGTH, seed=SEED)

    with _progress(console) as progress:

        def train_copy(name: str, copied: torch.nn.Module, dtype: str) -> Run:
            task = progress.add_task(name, total=options.steps, loss="")
            torch.manual_seed(SEED)

            def on_step(loss: float) -> None:
                progress.update(task, advance=1, loss=f"loss {loss:.4f}")
                done = int(progress.tasks[task].completed)
                if (
                    not console.is_terminal
                    and done * NUM_LINES // options.steps > (done - 1) * NUM_LINES // options.steps
                ):
                    console.print(f"{name}: step {done} of {options.steps}, loss {loss:.4f}")

            return train(copied, batches, dtype=dtype, on_step=on_step)

        reference = None
        if options.dtype != "fp32":
            reference = train_copy("stock, fp32", copy.deepcopy(model), "fp32")
        stock = train_copy("stock", copy.deepcopy(model), options.dtype)
        optimized_model = fxopt.optimize(copy.deepcopy(model))
        optimized = train_copy("optimized", optimized_model, options.dtype)

    comparison = Comparison(stock, optimized, reference)
    report = fxopt.explain(optimized_model)
    console.print()
    show_report(str(report))
    show_comparison(console, comparison)
    save_plot(options.out, comparison, f"{type(model).__name__}, {options.dtype} on {options.device}")
    console.print(f"Loss curves saved to {options.out}")
    if torch.device(options.device).type == "cpu":
        console.print(
            "This ran on a CPU: it proves equal losses and fewer bytes saved, and nothing about speed, "
            "since the fused kernels run on a GPU only."
        )
    return find_failures(comparison, report)


def check_options(options: DemoOptions) -> None:
    """Check what can be checked before training.

    Raises:
        FxoptError: the subject, what is wrong, and the cure.
    """
    if options.dtype not in DTYPES:
        raise FxoptError(f"--dtype: unknown name {options.dtype!r}, expected one of {', '.join(DTYPES)}")
    if options.steps < 2:
        raise FxoptError(f"--steps: too few to compare two curves, expected at least 2, got {options.steps}")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FxoptError(
            f"--device: {options.device!r} cannot be used here, expected a device that torch sees: {reason}\n"
            "give cpu, or cuda where torch was built for it and a GPU is there"
        ) from error
    if torch.device(options.device).type == "meta":
        raise FxoptError("--device: a model on meta has no weights to train, expected cpu or cuda")
    check_plot_file(options.out, "fxopt-demo.png")


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[loss]}"), console=console)
