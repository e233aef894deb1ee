"""TRL's SFTTrainer on fxopt against the same on Unsloth: the same rows, weights and settings, 30 steps.

    python -m benchmarks.sft --model /dev/shm/m/qwen2.5-7b --stacks unsloth,fxopt --out sft.json
    python -m benchmarks.sft --size tiny --stacks hf,fxopt --steps 3 --length 32      # on a CPU

Each stack runs in a process of its own. The rows are token ids, full ones of `--length` tokens from Python's manual,
or with `--natural` texts of their own lengths, so that no stack's templates or tokenizing make a difference. What a
stack changes in TRL by itself (padding-free batches, its own head) is left to it. Figures: the median of a step by the
trainer's own callbacks, steps 1 to 3 left out; the seconds until the first step is done; peak GiB; the losses.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch

from benchmarks import processes, stacks
from benchmarks.lengths import draw_texts

WARM_UP = 3
ROUND = 3
"""Digits after the point of a loss in the results."""


def make_rows(setup: stacks.Setup, rows: int, vocabulary: int, natural: bool) -> Any:
    """Return `rows` rows of `input_ids`, the same for every stack."""
    from datasets import Dataset

    topics = stacks.read_tokens(vocabulary)
    if natural:
        texts = draw_texts(topics, rows, setup.length, setup.seed)
    else:
        tokens = [token for topic in topics for paragraph in topic for token in paragraph]
        starts = [place * setup.length % (len(tokens) - setup.length) for place in range(rows)]
        texts = [tokens[start : start + setup.length] for start in starts]
    return Dataset.from_list([{"input_ids": text} for text in texts])


def make_clock(device: str) -> Any:
    """Return a callback that notes when each step is done."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """The seconds at which training began and each step was done."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def note(self) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.note()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.note()

    return Clock()


def measure(setup: stacks.Setup, steps: int, batch: int, accumulate: int, natural: bool) -> dict[str, Any]:
    """Train with one stack in this process and return its figures."""
    stacks.import_first(setup.stack)
    import trl as library
    from transformers import AutoTokenizer

    trl: Any = library
    model: Any = stacks.build(setup)
    tokenizer = AutoTokenizer.from_pretrained(setup.folder)
    rows = make_rows(setup, steps * batch * accumulate, model.config.vocab_size, natural)
    clock = make_clock(setup.device)
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as output:
        trainer = trl.SFTTrainer(
            model=model,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[clock],
            args=trl.SFTConfig(
                output_dir=output,
                max_steps=steps,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulate,
                max_length=setup.length,
                learning_rate=1e-4,
                lr_scheduler_type="constant",
                warmup_steps=0,
                optim="adamw_torch_fused" if setup.device == "cuda" else "adamw_torch",
                gradient_checkpointing=setup.checkpointed and setup.stack != "fxopt",
                bf16=True,
                use_cpu=setup.device == "cpu",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=setup.seed,
            ),
        )
        trainer.train()
    spans = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    settled = spans[min(WARM_UP, len(spans) - 1) :]
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    result = {
        "stack": setup.stack,
        "steps": steps,
        "median_ms": round(statistics.median(settled) * 1e3, 1),
        "seconds": round(sum(settled), 3),
        "first_step_s": round(spans[0], 3),
        "peak_gib": stacks.peak_gib(),
        "losses": [round(loss, ROUND) for loss in logged],
        "machine": stacks.describe_machine(),
    }
    if setup.stack == "fxopt":
        import fxopt

        report = fxopt.explain(model)
        result["fallbacks"] = {fallback.reason: fallback.count for fallback in report.fallbacks}
        result["notes"] = list(report.notes)
    return result


def main(argv: list[str] | None = None) -> int:
    """Run one stack in this process with `--stack`, else each of `--stacks` in one of its own."""
    parser = processes.make_parser(__doc__, compared="unsloth,fxopt", steps=30)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--natural", action="store_true", help="texts of their own lengths, up to --length")
    given = parser.parse_args(argv)

    def measure_one(setup: stacks.Setup) -> dict[str, Any]:
        return measure(setup, given.steps, given.batch, given.accumulate, given.natural)

    own = ("batch", "accumulate", "length", "natural")
    results = processes.run_stacks("benchmarks.sft", given, own, given.length, measure_one)
    if results is None:
        return 0
    for row in results:
        if "error" not in row:
            print(f"{row['stack']:12} {row['median_ms']:9.1f} ms a step, peak {row['peak_gib']:.2f} GiB")
    return int(any("error" in row for row in results))


if __name__ == "__main__":
    raise SystemExit(main())
