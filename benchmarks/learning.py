"""Does an optimized model learn as a stock one does? QLoRA on real text: stock, fxopt and an fp32 run, seed by seed.

    python -m benchmarks.learning --size 0.5b --out learning.json --plot docs/images/learning.png    # on a GPU
    python -m benchmarks.learning --size tiny --steps 4 --seeds 2 --length 32                         # on a CPU

Of each seed the three see the same adapters, batches and codes of the base. Stock and fxopt compute in bf16 under
autocast, the third in fp32 throughout. The text is Python's manual; `--model` is a folder with weights, without it
random ones of a shape are made. `loss` is the mean over the last tenth of the steps, `distance` the mean difference
of a step's loss from the fp32 run's. Returns 1 where a seed's loss is above stock's worst by more than stock's own
distance from fp32 (seeds are the same data for all: a smaller difference is rounding), or where the distance is above
stock's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks import stacks

MODES = ("stock", "fxopt", "fp32")
LEARNING_RATE = 2e-4


def train(mode: str, folder: str, tokens: torch.Tensor, seed: int, given: argparse.Namespace) -> list[float]:
    """Return the loss of each step of one run; the report of an optimized model has to be without a fallback."""
    from peft import LoraConfig, get_peft_model

    import fxopt
    from fxopt.demo.corpus import make_batches

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = stacks.load(folder, True, torch.float32 if mode == "fp32" else torch.bfloat16, device)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=stacks.RANK,
        lora_alpha=stacks.RANK,
        target_modules=stacks.PROJECTIONS,
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(base, config).train()
    model.config.use_cache = False
    if mode == "fxopt":
        model = fxopt.optimize(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=given.rate, fused=device == "cuda")
    batches = make_batches(
        tokens, num_batches=given.steps, batch_size=given.batch, length=given.length, seed=seed
    )
    losses: list[float] = []
    for batch in batches:
        batch = batch.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=mode != "fp32"):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    if mode == "fxopt":
        report = fxopt.explain(model)
        sites = [site for site in report.sites if site.pattern == "lora_linear"]
        stock = [site.reason for site in sites if site.status != "rewritten"]
        if report.fallbacks or stock or not sites:
            raise SystemExit(f"benchmarks.learning: not all ran optimized: {report.fallbacks} {stock}")
    return losses


def summarize(runs: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Return of each mode the loss at the end and the distance from fp32, by seed, and what is asked of them."""
    tail = max(len(runs["stock"][0]) // 10, 1)
    loss = {mode: [statistics.mean(losses[-tail:]) for losses in seeds] for mode, seeds in runs.items()}
    distance = {
        mode: [
            statistics.mean(abs(a - b) for a, b in zip(losses, exact, strict=True))
            for losses, exact in zip(runs[mode], runs["fp32"], strict=True)
        ]
        for mode in ("stock", "fxopt")
    }
    above = max(loss["fxopt"]) - max(loss["stock"])
    return {
        "loss": loss,
        "distance": distance,
        "above_stocks_worst": above,
        "no_worse_than_stocks_worst": above <= max(distance["stock"]),
        "as_close_to_fp32": statistics.mean(distance["fxopt"]) <= statistics.mean(distance["stock"]),
    }


def plot(runs: dict[str, list[list[float]]], path: Path, title: str) -> None:
    """Write the losses of all runs, and under them how far each is from fp32, to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"stock": "tab:gray", "fxopt": "tab:orange", "fp32": "black"}
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True)
    for mode, seeds in runs.items():
        for seed, losses in enumerate(seeds):
            steps = range(1, len(losses) + 1)
            label = mode if seed == 0 else None
            style = {"color": colours[mode], "linewidth": 0.8, "label": label}
            above.plot(steps, losses, linestyle=":" if mode == "fp32" else "-", **style)
            if mode != "fp32":
                exact = runs["fp32"][seed]
                below.plot(steps, [a - b for a, b in zip(losses, exact, strict=True)], **style)
    above.set(title=title, ylabel="loss")
    below.set(xlabel="step", ylabel="loss - loss in fp32")
    below.axhline(0, color="black", linewidth=0.5)
    above.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run all modes of all seeds, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder with weights; random ones are made if not given")
    parser.add_argument("--size", default="0.5b", help="of the weights that are made: tiny, 0.5b, 1.5b, 7b")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--out", type=Path, help="write losses and summary as JSON")
    parser.add_argument("--plot", type=Path, help="write a picture")
    given = parser.parse_args(argv)
    folder = stacks.find_folder(given.model, given.size)
    vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    topics = stacks.read_tokens(vocabulary)
    tokens = torch.tensor([token for topic in topics for paragraph in topic for token in paragraph])
    runs: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    for seed in range(given.seeds):
        for mode in MODES:
            runs[mode].append(train(mode, folder, tokens, seed, given))
            print(
                f"seed {seed} {mode:6} first {runs[mode][-1][0]:.4f} last {runs[mode][-1][-1]:.4f}",
                flush=True,
            )
    summary = summarize(runs)
    print(json.dumps(summary, indent=1))
    work = {name: getattr(given, name) for name in ("size", "model", "steps", "batch", "length", "rate")}
    if given.out is not None:
        result = {"machine": stacks.describe_machine(), "work": work, "summary": summary, "runs": runs}
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    if given.plot is not None:
        what = f"{given.model or given.size}, {given.batch} x {given.length}, {given.seeds} seeds"
        plot(runs, given.plot, f"QLoRA, {what}")
    return int(not (summary["no_worse_than_stocks_worst"] and summary["as_close_to_fp32"]))


if __name__ == "__main__":
    raise SystemExit(main())
