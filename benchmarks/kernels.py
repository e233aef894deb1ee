"""Times every kernel against its peers on this GPU: `python -m benchmarks.kernels --out results.json`.

Per kernel and size, forward and backward: the median ms that the GPU takes, the L2 cache emptied before each run and
the GPU kept busy until the host has queued it, so that nobody's Python is timed (a compiled graph runs none), for

    fxopt      the op, through autograd
    liger      liger_kernel's functional form
    cce        cut_cross_entropy without its gradient filter
    sdpa       torch's attention by its own choice; `cudnn`, `flash`, `efficient` by one backend of it
    flex       torch's flex_attention, compiled, with a block mask
    bnb        bitsandbytes
    compile    torch.compile of the eager form
    eager      what a stock model runs
    copy       a copy that moves the bytes the kernel has to move; for linear_cross_entropy `gemms`, its matrix
               products alone

An op is timed only after its own tests (`tests/kernels/test_<op>.py -m gpu`) have passed on this GPU, and a size
only after the op has agreed with its reference there; what is refused is in the results. Rows that fxopt loses
are kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import ALL
from benchmarks.cases.case import Case, Function
from fxopt.kernels.attention import chosen_backends
from fxopt.kernels.launch import find_obstacle

ROOT = Path(__file__).parent.parent
HEAD_ROWS = 512
"""Rows a loss head is checked with: its logits in float64 would not fit at the size that is timed."""
FLOOR = 2**-8
"""Half an eps of bf16, what the kernels' tests allow on a GPU beside twice eager's own error."""
CACHE_BYTES = 256 * 2**20
HEAD_START_CYCLES = 4_000_000
"""About 2 ms at 1.8 GHz: longer than any contestant takes to queue its launches."""
FEWEST_RUNS, MOST_RUNS, BUDGET_MS = 8, 40, 60.0
COLUMNS = (
    "fxopt",
    "liger",
    "cce",
    "sdpa",
    "cudnn",
    "flash",
    "efficient",
    "flex",
    "bnb",
    "compile",
    "eager",
    "copy",
    "gemms",
)


def outputs_of(function: Function, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return what `function` returns, as a tuple."""
    found = function(*tensors)
    return found if isinstance(found, tuple) else (found,)


def find_red_tests(op: str) -> str | None:
    """Run the tests of `op` on this GPU and return why it may not be timed, or None."""
    path = ROOT / "tests" / "kernels" / f"test_{op}.py"
    if not path.exists():
        return f"there is no {path.relative_to(ROOT)}, expected the tests of its kernels"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    return f"its tests are red (exit code {done.returncode}):\n{(done.stdout + done.stderr)[-2000:]}"


def gradients(function: Function, tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the outputs and the gradients of `function`, computed in `dtype`."""
    leaves = [
        value.detach().to(dtype).requires_grad_(value.requires_grad) if value.is_floating_point() else value
        for value in tensors
    ]
    outputs = outputs_of(function, leaves)
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    seeds = [torch.ones_like(y) for y in outputs]
    found = torch.autograd.grad(outputs, needed, seeds) if needed else ()
    return [*(y.detach() for y in outputs), *found]


def find_disagreement(case: Case) -> str | None:
    """Return where the op is further from its reference in float64 than twice eager is, or None.

    No kernel takes float64: there the op itself is its reference, with the attributes the case gives it.
    """
    rows = case.checked_rows or case.rows
    tensors = case.make(rows if case.gemms is None else min(rows, HEAD_ROWS))
    exact = gradients(case.contestants["fxopt"], tensors, torch.float64)
    eager = gradients(case.contestants["eager"], tensors, torch.bfloat16)
    ours = gradients(case.contestants["fxopt"], tensors, torch.bfloat16)
    for index, (value, stock, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        error, allowed = (
            torch.linalg.vector_norm(other.double() - truth) / torch.linalg.vector_norm(truth)
            for other in (value, stock)
        )
        if not error <= 2 * allowed + FLOOR:
            return f"output {index}: error {error:.2e}, eager has {allowed:.2e}"
    return None


def median_ms(function: Callable[[], Any]) -> float:
    """Return the median ms of GPU time of `function`, its launches queued before the GPU comes to them."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    function()
    torch.cuda.synchronize()
    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    spent_ms = 0.0
    while len(spans) < MOST_RUNS and (spent_ms < BUDGET_MS or len(spans) < FEWEST_RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        spans.append((start, end))
        spent_ms += start.elapsed_time(end)
    return statistics.median(start.elapsed_time(end) for start, end in spans)


def time_copy(num_bytes: int) -> float:
    source = torch.empty(num_bytes // 4, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return median_ms(lambda: target.copy_(source))


def time_contestant(function: Function, tensors: list[torch.Tensor]) -> tuple[float, float, int]:
    """Return ms of forward and of backward, and the most bytes both allocate beyond inputs."""
    forward, backward = time_passes(function, tensors)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = outputs_of(function, tensors)
    needed = [value for value in tensors if value.requires_grad]
    if needed:
        torch.autograd.grad(outputs, needed, [torch.ones_like(y) for y in outputs])
    return forward, backward, torch.cuda.max_memory_allocated() - before


def time_passes(function: Function, tensors: list[torch.Tensor]) -> tuple[float, float]:
    needed = [value for value in tensors if value.requires_grad]
    if not needed:
        return median_ms(lambda: function(*tensors)), 0.0
    outputs = outputs_of(function, tensors)
    seeds = [torch.ones_like(y) for y in outputs]

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(outputs, needed, seeds, retain_graph=True)

    backward()  # compiles what is compiled on first use
    return median_ms(lambda: function(*tensors)), median_ms(backward)


def run_case(case: Case) -> list[dict[str, Any]]:
    """Return one row for forward, one for backward, and for the loss head one for both together."""
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    peak: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name, function in case.contestants.items():
        torch.manual_seed(0)
        try:
            forward[name], backward[name], peak[name] = time_contestant(function, case.make(case.rows))
        except Exception as error:  # a peer that cannot run is part of the result
            if name == "fxopt":
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:200]
        torch.cuda.empty_cache()
    tensors = case.make(case.rows)
    if case.forward_bytes:
        forward["copy"] = time_copy(case.forward_bytes)
        if case.backward_bytes:
            backward["copy"] = time_copy(case.backward_bytes)
    rows = [("forward", forward)]
    if any(value.requires_grad for value in tensors):
        rows.append(("backward", backward))
    if case.gemms is not None:
        both = {name: forward[name] + backward[name] for name in forward}
        both["gemms"] = median_ms(case.gemms(tensors))
        rows.append(("both", both))
    return [
        {
            "kernel": case.kernel,
            "size": case.size,
            "pass": name,
            "ms": ms,
            "peak_bytes": peak,
            "failed": failed,
        }
        for name, ms in rows
    ]


def render_row(row: dict[str, Any]) -> str:
    ms = row["ms"]
    cells = [f"{ms[name]:9.3f}" if name in ms else f"{'-':>9}" for name in COLUMNS]
    fraction = f"{ms['copy'] / ms['fxopt']:7.0%}" if "copy" in ms else f"{'':7}"
    text = f"{row['kernel']:21} {row['size']:38} {row['pass']:9}" + "".join(cells) + fraction
    if row["pass"] == "both":
        text += "  peak GiB " + " ".join(f"{k} {v / 2**30:.2f}" for k, v in row["peak_bytes"].items())
    return text


def describe_machine(commit: str | None) -> dict[str, Any]:
    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    if commit is None:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    packages = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy")
    return {
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {package: version(package) for package in packages},
        "commit": commit,
    }


def main() -> int:
    """Run all cases, or those named; return 1 if one was refused: its tests are red, or its result is off."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--commit", help="the commit measured, where there is no git")
    parser.add_argument("--only", default="", help="kernels to run, separated by commas")
    parser.add_argument(
        "--skip-tests", action="store_true", help="the kernels' tests just passed here; the results say it"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.kernels: no CUDA device, expected one; kernels are timed on a GPU only")
        return 2
    obstacle = find_obstacle(torch.cuda.current_device(), torch.bfloat16)
    if obstacle is not None:
        print(f"benchmarks.kernels: the kernels cannot run here: {obstacle}")
        return 2
    machine = describe_machine(arguments.commit)
    print(json.dumps(machine))
    print(
        f"{'kernel':21} {'size':38} {'pass':9}" + "".join(f"{name:>9}" for name in COLUMNS) + "  fxopt/copy"
    )
    rows: list[dict[str, Any]] = []
    refusals: list[str] = []
    tests: dict[str, str] = {}

    def write() -> None:
        if arguments.out is not None:
            result = {"machine": machine, "tests": tests, "rows": rows, "refusals": refusals}
            result["backends of attention"] = chosen_backends()
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")

    def refuse(text: str) -> None:
        refusals.append(text)
        print(text, flush=True)
        write()

    for name, make_cases in ALL.items():
        if arguments.only and name not in arguments.only.split(","):
            continue
        red = None if arguments.skip_tests else find_red_tests(name)
        tests[name] = "skipped by --skip-tests" if arguments.skip_tests else "red" if red else "passed"
        if red is not None:
            refuse(f"{name}: not timed: {red}")
            continue
        for case in make_cases():
            torch.manual_seed(0)
            torch._dynamo.reset()
            disagreement = find_disagreement(case)
            torch.cuda.empty_cache()
            if disagreement is not None:
                refuse(f"{case.kernel} {case.size}: not timed: {disagreement}")
                continue
            for row in run_case(case):
                rows.append(row)
                print(render_row(row), flush=True)
            torch.cuda.empty_cache()
            write()
    for call, choice in chosen_backends().items():
        print(f"{call}: {choice}")
    return 1 if refusals else 0


if __name__ == "__main__":
    sys.exit(main())
