"""Steps of a QLoRA over texts of their own lengths, 64 to 4096 tokens, one at a time, unpacked; recompiles counted.

    python -m benchmarks.lengths --model /dev/shm/m/qwen2.5-7b --stacks unsloth,diy,hf,fxopt --out lengths.json
    python -m benchmarks.lengths --size tiny --stacks hf,fxopt --steps 4 --most 96      # on a CPU

The texts are Python's manual: from a paragraph drawn at random to the end of its topic. Each stack sees the same
ones, in a process of its own. `--model` is a folder with weights; without, random ones of a shape are made.

Of each stack: the seconds of all steps but the first, tokens a second of these, the seconds of the first step, peak
GiB, and how many graphs Dynamo captured after the first step, each a recompile. Of fxopt also `fallbacks`, calls that
ran stock, and `captures_beyond_first`, of all regions over the whole run.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import torch

from benchmarks import processes, stacks

LEAST_TOKENS, MOST_TOKENS = 64, 4096


def draw_texts(topics: list[list[list[int]]], steps: int, most: int, seed: int) -> list[list[int]]:
    """Return `steps` texts of LEAST_TOKENS to `most` tokens, each from a paragraph to the end of its topic."""
    generator = random.Random(seed)
    texts: list[list[int]] = []
    while len(texts) < steps:
        topic = generator.choice(topics)
        start = generator.randrange(len(topic))
        text = [token for paragraph in topic[start:] for token in paragraph][:most]
        if len(text) >= LEAST_TOKENS:
            texts.append(text)
    return texts


def measure(setup: stacks.Setup, steps: int, most: int) -> dict[str, Any]:
    """Run the steps of one stack in this process and return its figures."""
    stacks.import_first(setup.stack)
    model: Any = stacks.build(setup)
    texts = draw_texts(stacks.read_tokens(model.config.vocab_size), steps, most, setup.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=setup.device == "cuda")
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    losses: list[float] = []
    graphs = 0
    for text in texts:
        batch = torch.tensor([text], device=setup.device)
        start = time.perf_counter()
        with torch.autocast(setup.device, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, attention_mask=torch.ones_like(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for the step
        if setup.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        graphs = graphs or stacks.num_graphs()
    result = {
        "stack": setup.stack,
        "steps": steps,
        "lengths": len(set(map(len, texts))),
        "seconds": round(sum(seconds[1:]), 3),
        "tokens_per_second": round(sum(map(len, texts[1:])) / sum(seconds[1:]), 1),
        "median_ms": round(statistics.median(seconds[1:]) * 1e3, 1),
        "first_step_s": round(seconds[0], 3),
        "peak_gib": stacks.peak_gib(),
        "recompiles": stacks.num_graphs() - graphs,
        "losses": [round(loss, 4) for loss in losses],
        "machine": stacks.describe_machine(),
    }
    if setup.stack == "fxopt":
        import fxopt

        report = fxopt.explain(model)
        result["fallbacks"] = sum(fallback.count for fallback in report.fallbacks)
        result["captures_beyond_first"] = sum(max(region.captures - 1, 0) for region in report.regions)
    return result


def render(results: list[dict[str, Any]]) -> str:
    """Return the stacks as a table, each one's time against that of fxopt."""
    ours = next((row["seconds"] for row in results if row["stack"] == "fxopt" and "seconds" in row), None)
    lines = [
        f"{'stack':12} {'s':>9} {'tok/s':>9} {'first s':>8} {'peak GiB':>9} {'recompiles':>11}  fxopt / it"
    ]
    for row in results:
        if "error" in row:
            lines.append(f"{row['stack']:12} failed: {row['error'].strip().splitlines()[-1:]}")
            continue
        ratio = "" if ours is None else f"{ours / row['seconds']:10.2f}"
        lines.append(
            f"{row['stack']:12} {row['seconds']:9.2f} {row['tokens_per_second']:9.0f} {row['first_step_s']:8.1f} "
            f"{row['peak_gib']:9.2f} {row['recompiles']:11d}  {ratio}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one stack in this process with `--stack`, else each of `--stacks` in one of its own."""
    parser = processes.make_parser(__doc__, compared="unsloth,diy,hf,fxopt", steps=200)
    parser.add_argument("--most", type=int, default=MOST_TOKENS, help="tokens of the longest text")
    given = parser.parse_args(argv)

    def measure_one(setup: stacks.Setup) -> dict[str, Any]:
        return measure(setup, given.steps, given.most)

    results = processes.run_stacks("benchmarks.lengths", given, ("most",), given.most, measure_one)
    if results is None:
        return 0
    print(render(results))
    return int(any("error" in row for row in results))


if __name__ == "__main__":
    raise SystemExit(main())
