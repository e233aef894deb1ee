"""Step times of many types of models, stock against fxopt, on one GPU: is any of them slower optimized?

    python -m benchmarks.architectures --out architectures.json
    python -m benchmarks.architectures --tiny --steps 1 --types llama,gpt2 --out architectures.json      # on a CPU

Each type has a process of its own and a model of two to four layers in bf16, as wide as its published ones where the
table does not say otherwise. All processes build and capture side by side, `--jobs` at a time; then each in its turn,
with the GPU to itself, runs rounds of `--steps` steps, stock and optimized by turns, on the same weights. A step is
forward and backward: an optimizer would be the same in both. `ratio` is fxopt's median step over stock's.

Who has not captured after `--seconds` is a row that says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import stacks

VOCABULARY, ROUNDS = 32000, 3
CAUSAL, MASKED = "AutoModelForCausalLM", "AutoModelForMaskedLM"
KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
TYPES: dict[str, tuple[str, tuple[int, int], dict[str, Any]]] = {
    "llama": (CAUSAL, (2, 2048), {}),
    "qwen3": (CAUSAL, (2, 2048), {}),
    "gemma3_text": (CAUSAL, (2, 2048), KINDS),
    "phi3": (CAUSAL, (2, 2048), {}),
    "gpt2": (CAUSAL, (4, 1024), {"num_hidden_layers": 4, "n_embd": 1600, "n_head": 25}),
    "gpt_neox": (
        CAUSAL,
        (2, 2048),
        {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32},
    ),
    "cohere2": (CAUSAL, (2, 2048), {"hidden_size": 4096, "intermediate_size": 11264, **KINDS}),
    "olmo2": (CAUSAL, (2, 2048), {}),
    "mixtral": (CAUSAL, (2, 2048), {"intermediate_size": 4096}),
    "deepseek_v3": (
        CAUSAL,
        (2, 2048),
        {"hidden_size": 4096, "n_routed_experts": 32, "num_attention_heads": 32, "first_k_dense_replace": 1},
    ),
    "gpt_oss": (CAUSAL, (2, 2048), {"num_local_experts": 32, **KINDS}),
    "bert": (
        MASKED,
        (16, 512),
        {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 4},
    ),
}
"""Of each type the class that makes it, rows and tokens of a batch, and fields of its config."""
COMMON: dict[str, Any] = {
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "use_cache": False,
    "pad_token_id": 0,
}
TINY_BATCH = (2, 16)


def make_model(name: str, *, tiny: bool) -> tuple[Any, tuple[int, int]]:
    """Return the model of one type on its device, in training mode, and the form of its batches."""
    import transformers
    from transformers import AutoConfig

    from fxopt.coverage.shrink import tiny_config

    auto, batch, fields = TYPES[name]
    if tiny:
        config, batch = tiny_config(name), TINY_BATCH
    else:
        randoms = [field for field in AutoConfig.for_model(name).to_dict() if "drop" in field]
        config = AutoConfig.for_model(name, **{**dict.fromkeys(randoms, 0.0), **COMMON, **fields})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(transformers, auto).from_config(config, dtype=torch.bfloat16)
    return model.train(), batch


def run_step(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Return the loss of one step."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def time_steps(model: Any, batch: dict[str, torch.Tensor], steps: int) -> list[float]:
    """Return the ms of each of some steps, by the clock: what the host takes is a part of them."""
    found: list[float] = []
    for step in range(steps + 1):
        synchronize()
        start = time.perf_counter()
        run_step(model, batch)
        synchronize()
        if step:
            found.append((time.perf_counter() - start) * 1e3)
    return found


def synchronize() -> None:
    """Wait for the GPU where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_type(name: str, given: argparse.Namespace, slots: Any, pipe: Any) -> None:
    """Capture one type, say "ready", wait for the turn, and send the row; a failure is a row too."""
    try:
        with slots:
            prepared = prepare(name, given)
        pipe.send("ready")
        if pipe.recv() == "go":
            pipe.send(measure(name, *prepared, given.steps))
    except Exception as error:
        pipe.send({"type": name, "error": f"{type(error).__name__}: {error}"[:500]})


def prepare(name: str, given: argparse.Namespace) -> tuple[Any, Any, dict[str, torch.Tensor], dict[str, Any]]:
    """Return a stock model, an optimized one with the same weights, a batch, and what is known of them so far."""
    import fxopt

    start = time.perf_counter()
    stock, form = make_model(name, tiny=given.tiny)
    weights = {id(each): each for each in (*stock.parameters(), *stock.buffers())}
    model = copy.deepcopy(stock, weights)
    ids = torch.randint(3, 250, form, device=stock.device)
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    theirs = float(run_step(stock, batch))
    fxopt.optimize(model)
    captured = time.perf_counter()
    ours = float(run_step(model, batch))
    first_step_s = time.perf_counter() - captured
    for _ in range(2):  # CUDA graphs are recorded at the second call
        run_step(model, batch)
    model.zero_grad(set_to_none=True)
    synchronize()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    row = {
        "type": name,
        "batch": form,
        "parameters": sum(weight.numel() for weight in stock.parameters()),
        "loss_stock": round(theirs, 5),
        "loss_fxopt": round(ours, 5),
        "first_step_s": round(first_step_s, 1),
        "ready_s": round(time.perf_counter() - start, 1),
    }
    return stock, model, batch, row


def measure(
    name: str, stock: Any, model: Any, batch: dict[str, torch.Tensor], row: dict[str, Any], steps: int
) -> dict[str, Any]:
    """Return the row of one type, its two models timed by turns."""
    import fxopt

    runs: dict[str, list[float]] = {"stock": [], "fxopt": []}
    peaks: dict[str, float] = {}
    for _ in range(ROUNDS):
        for kind, each in (("stock", stock), ("fxopt", model)):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            runs[kind] += time_steps(each, batch, steps)
            peaks[kind] = max(peaks.get(kind, 0.0), stacks.peak_gib())
    report = fxopt.explain(model)
    medians = {kind: statistics.median(times) for kind, times in runs.items()}
    return {
        **row,
        "stock_ms": round(medians["stock"], 2),
        "fxopt_ms": round(medians["fxopt"], 2),
        "ratio": round(medians["fxopt"] / medians["stock"], 3),
        "runs_ms": {kind: [round(each, 2) for each in times] for kind, times in runs.items()},
        "peak_gib": peaks,
        "fallbacks": {each.reason: each.count for each in report.fallbacks},
        "regions": {each.module or "model": each.status for each in report.regions},
        "notes": list(report.notes),
    }


def run_all(names: list[str], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per type: all capture side by side, then each is timed alone."""
    context = multiprocessing.get_context("spawn")
    slots = context.Semaphore(given.jobs)
    deadline = time.monotonic() + given.seconds
    children: dict[str, tuple[Any, Any]] = {}
    for name in names:
        ours, theirs = context.Pipe()
        process = context.Process(target=run_type, args=(name, given, slots, theirs), daemon=True)
        process.start()
        theirs.close()
        children[name] = (process, ours)
    said: dict[str, Any] = {}
    for name, (_, pipe) in children.items():
        said[name] = receive(name, pipe, max(0.0, deadline - time.monotonic()), given.seconds)
    for name, (process, _) in children.items():
        if said[name] != "ready":
            process.kill()
    rows: list[dict[str, Any]] = []
    for name, (process, pipe) in children.items():
        row = said[name]
        if row == "ready":
            pipe.send("go")
            row = receive(name, pipe, given.seconds, given.seconds)
        process.join(1 if isinstance(row, dict) else 0)
        process.kill()
        rows.append(row)
        shown = ("type", "stock_ms", "fxopt_ms", "ratio", "error")
        print(json.dumps({key: row[key] for key in shown if key in row}), flush=True)
    return rows


def receive(name: str, pipe: Any, seconds: float, given: float) -> Any:
    """Return what a process says next, or a row that says why it says nothing."""
    try:
        if pipe.poll(seconds):
            return pipe.recv()
    except (EOFError, OSError):
        return {"type": name, "error": "its process ended"}
    return {"type": name, "error": f"nothing after {given:.0f} s"}


def main(argv: list[str] | None = None) -> int:
    """Measure all types and write one JSON; 1 where one failed or is slower by more than `--most`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", default=",".join(TYPES), help=f"some of {', '.join(TYPES)}")
    parser.add_argument("--steps", type=int, default=5, help="of each round")
    parser.add_argument("--jobs", type=int, default=6, help="types that capture at a time")
    parser.add_argument("--seconds", type=float, default=110, help="that all may take to capture")
    parser.add_argument("--most", type=float, default=1.05, help="the ratio that none should exceed")
    parser.add_argument("--tiny", action="store_true", help="models of 100,000 parameters")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    given = parser.parse_args(argv)
    rows = run_all(given.types.split(","), given)
    slower = [row["type"] for row in rows if row.get("ratio", 0.0) > given.most]
    failed = [row["type"] for row in rows if "error" in row]
    result = {"machine": stacks.describe_machine(), "slower": slower, "failed": failed, "rows": rows}
    print(f"{len(rows)} types: {len(slower)} slower by more than {given.most - 1:.0%}, {len(failed)} failed")
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(slower or failed))


if __name__ == "__main__":
    raise SystemExit(main())
