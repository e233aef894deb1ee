"""The `fxopt` command and its subcommands.

Mistakes of the user end in one clear message and exit code 2; a demo that does not hold, coverage that is not whole
under `--strict`, a report that lost something, a check with culprits, a pattern with a failing proof end with 1.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from fxopt.demo.plot_file import check_plot_file
from fxopt.errors import FxoptError
from fxopt.report.text import WIDTH

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Rewrite Hugging Face models to fused ops, and say what was done.",
)

Source = Annotated[
    str | None, typer.Argument(help="A folder with a config.json, or a name on the Hugging Face hub.")
]
Archs = Annotated[
    list[str] | None, typer.Option(metavar="MODEL_TYPE", help="A model type with its default config.")
]
Budget = Annotated[
    str, typer.Option(help='Bytes, a size like "12GiB", a share of the device, min, auto or none.')
]
Batch = Annotated[int, typer.Option(min=1, help="Sequences of a step.")]
Seq = Annotated[
    int | None,
    typer.Option(
        min=2, help="Tokens of a sequence; if not given, 4096 or what the model takes.", show_default=False
    ),
]
Lora = Annotated[bool, typer.Option("--lora", help="With low-rank adapters on all linear layers.")]
FourBit = Annotated[
    bool, typer.Option("--4bit", help="With NF4 weights under the adapters, as QLoRA has them.")
]
Fields = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="A field of the config; may be given several times."),
]
Gpu = Annotated[str, typer.Option(metavar="GPU", help="H100, H200, A100, 4090 or L4.")]
Jobs = Annotated[int, typer.Option(min=1, help="Models tried at a time, each in its own process.")]
STYLES = {"  +": "green", "  -": "red", "  @@": "cyan"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the demo does not hold, 2 a mistake of the user's."""
    if not os.environ.get("TORCH_LOGS"):
        warnings.filterwarnings("ignore", module=r"torch\._dynamo")  # what it traces is no code of the user's
    try:
        app(args=None if arguments is None else list(arguments), prog_name="fxopt")
    except FxoptError as error:
        print(f"fxopt: {error}", file=sys.stderr)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fxopt {importlib.metadata.version('fxopt')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command()
def demo(
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1.")] = "cpu",
    steps: Annotated[int, typer.Option(help="Training steps of each run.")] = 60,
    arch: Annotated[
        str,
        typer.Option(metavar="MODEL_TYPE", help="Any architecture with a causal LM: llama, gemma2, bert."),
    ] = "llama",
    dtype: Annotated[str, typer.Option(help="fp32, or autocast to bf16 or fp16.")] = "fp32",
    out: Annotated[Path, typer.Option(help="Where the loss curves go, as a PNG.")] = Path("fxopt-demo.png"),
) -> None:
    """Train a small model on real English, as stock and optimized, and compare the two."""
    from fxopt.demo.run import DemoOptions, run_demo

    console = _console()
    options = DemoOptions(device=device, steps=steps, arch=arch, dtype=dtype, out=out)
    failures = run_demo(options, console, lambda text: _print_report(console, text))
    for failure in failures:
        print(f"fxopt demo: failed: {failure}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)
    console.print("fxopt demo: passed")


@app.command()
def report(
    source: Source = None,
    arch: Archs = None,
    fields: Fields = None,
    budget: Budget = "auto",
    batch: Batch = 1,
    seq: Seq = None,
    lora: Lora = False,
    four_bit: FourBit = False,
    device: Gpu = "H100",
    json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write one HTML file instead of printing.")] = None,
) -> None:
    """Print what fxopt would do to a model and plan for it, from its config alone: no weights are loaded."""
    model_type = _check_source("report", source, arch or ())
    if html is not None:
        _check_writable(html)
    from fxopt.offline import Setting, report_offline

    setting = Setting(
        source, model_type, budget, batch, seq, lora, device, four_bit, fields=tuple(fields or ())
    )
    found = report_offline(setting)
    if html is not None:
        _write(html, found.save_html)
        print(f"fxopt report: wrote {html}", file=sys.stderr)
    if json:
        print(found.to_json())
    elif html is None:
        _print_report(_console(), str(found))


@app.command()
def trace(
    source: Source = None,
    arch: Archs = None,
    fields: Fields = None,
) -> None:
    """Print the canonical graph of each distinct block, as patterns see it, as Python that runs."""
    model_type = _check_source("trace", source, arch or ())
    from fxopt.offline import trace_offline

    print(trace_offline(source, model_type, fields or ()), end="")


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A report as JSON, before.")],
    second: Annotated[Path, typer.Argument(help="A report as JSON, after.")],
) -> None:
    """Compare two reports; exit with 1 where a rewrite, a capture, a served call, a plan or a figure was lost."""
    from fxopt.report.diff import diff_reports
    from fxopt.report.load import load_report

    found = diff_reports(load_report(first), load_report(second))
    _print_report(_console(), str(found).rstrip("\n"))
    if found.lost:
        raise typer.Exit(1)


@app.command()
def bisect(
    script: Annotated[Path, typer.Argument(help="A Python file that defines `model` and `check(model)`.")],
) -> None:
    """Find the rewrites that make a check fail; exit with 1 where there are any."""
    from fxopt.bisection import bisect, load_script

    found = bisect(*load_script(script))
    print(found)
    if found.rewrites:
        raise typer.Exit(1)


@app.command("check-pattern")
def check_pattern(
    file: Annotated[Path, typer.Argument(help="A Python file that defines patterns.")],
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TYPE", help="Also say what it matches in this model type; several times, or `all`."
        ),
    ] = None,
    jobs: Jobs = 2,
) -> None:
    """Run the proofs of the patterns in a file; exit with 1 where one fails."""
    from fxopt.authoring.check import check_pattern
    from fxopt.authoring.files import load_patterns
    from fxopt.authoring.reach import check_names, find_reach

    check_names(over or ())
    patterns = load_patterns(file)
    failed = False
    for pattern in patterns:
        print(pattern)
        for finding in check_pattern(pattern):
            print(f"  {finding}")
            failed |= not finding.holds
    for line in find_reach(file, over or (), jobs):
        tqdm.write(line)  # above the bar
    if failed:
        raise typer.Exit(1)


@app.command("new-pattern")
def new_pattern(
    name: Annotated[str, typer.Argument(help="The pattern's name, in lower case.")],
    out: Annotated[Path, typer.Option(help="The folder in which its own folder is made.")] = Path("."),
) -> None:
    """Write the skeleton of a pattern: kernel, pattern, test, benchmark and page; its tests pass as written."""
    from fxopt.authoring.skeleton import write_skeleton

    for path in write_skeleton(name, out):
        print(f"fxopt new-pattern: wrote {path}")


@app.command()
def plan(
    source: Source = None,
    arch: Archs = None,
    fields: Fields = None,
    budget: Budget = "auto",
    batch: Batch = 1,
    seq: Seq = None,
    lora: Lora = False,
    four_bit: FourBit = False,
    host_memory: Annotated[
        str, typer.Option(help='How much may wait in the host\'s memory, as "64GiB".')
    ] = "0",
    device: Gpu = "H100",
    out: Annotated[
        Path,
        typer.Option(help="Where the curve of time over memory goes, as a PNG; beside it the same as CSV."),
    ] = Path("fxopt-plan.png"),
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Plan what a model's blocks save for backward and compute again, from its config alone."""
    model_type = _check_source("plan", source, arch or ())
    check_plot_file(out, "fxopt-plan.png")
    for path in (out, out.with_suffix(".csv")):
        _check_writable(path)
    from fxopt.offline import Setting, plan_offline, render_curve

    chosen = tuple(fields or ())
    setting = Setting(source, model_type, budget, batch, seq, lora, device, four_bit, host_memory, chosen)
    found, curve = plan_offline(setting, out)
    if json:
        print(found.to_json())
        return
    console = _console()
    _print_report(console, str(found))
    _print_report(console, render_curve(curve))
    console.print(f"fxopt plan: see {out} and {out.with_suffix('.csv')}", soft_wrap=True)


@app.command()
def coverage(
    arch: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE[:TASK]", help="Only these model types; may be given several times."),
    ] = None,
    jobs: Jobs = 2,
    out: Annotated[
        Path,
        typer.Option(help="Where the rows go, as JSON; beside it a page (.md) and the lines of the run."),
    ] = Path("coverage.json"),
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 where a model is wrong or not wholly captured.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the rows that a stopped run with this --out has written.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=1, help="The most that one model may take.")] = 180,
) -> None:
    """Optimize a tiny model of every architecture of the installed transformers, and compare it with stock."""
    from fxopt.coverage.run import cover

    problems, summary = cover(arch, jobs=jobs, out=out, resume=resume, seconds=seconds)
    print(f"fxopt coverage: {summary}; see {out} and {out.with_suffix('.md')}")
    if strict and problems:
        for problem in problems:
            print(f"fxopt coverage: {problem}", file=sys.stderr)
        raise typer.Exit(1)


def _check_source(command: str, source: str | None, archs: Sequence[str]) -> str | None:
    """Return the model type that is asked for, None where a source is.

    Raises:
        FxoptError: not exactly one model is named.
    """
    named = [*([] if source is None else [repr(source)]), *(f"--arch {arch}" for arch in archs)]
    if len(named) != 1:
        raise FxoptError(
            f"{command}: which model is not clear, expected a path or hub name, or --arch MODEL_TYPE, "
            f"got {' and '.join(named) or 'neither'}\ntry fxopt {command} --arch {archs[0] if archs else 'llama'}"
        )
    return archs[0] if archs else None


def _check_writable(path: Path) -> None:
    """Check that a file can be written before the work is done that it is for; one that is there keeps its text."""
    existed = path.exists()
    _write(path, lambda target: target.open("a").close())
    if not existed:
        path.unlink()


def _write(path: Path, save: Callable[[Path], None]) -> None:
    try:
        save(path)
    except OSError as error:
        raise FxoptError(f"{path}: cannot be written: {error.strerror}\ngive another file") from error


def _console() -> Console:
    """Return a console that wraps at a width of ours where there is no terminal to ask."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=WIDTH)


def _print_report(console: Console, text: str) -> None:
    for line in text.splitlines():
        style = next((style for start, style in STYLES.items() if line.startswith(start)), "")
        if line and not line.startswith(" "):
            style = "bold"
        console.print(Text(line, style=style), soft_wrap=True)
    console.print()
