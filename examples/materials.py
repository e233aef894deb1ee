"""What the examples train on, made on this machine: chats, a tokenizer with a chat template, a model's weights.

Nothing is fetched. The chats are made of `pydoc_data.topics`, the manual that comes with Python; the tokenizer is
trained on them; the model has random weights in a shape of Qwen2.5's. With `--model` an example reads a model and
its tokenizer from a folder instead.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config
from transformers.trainer_utils import get_last_checkpoint

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
    },
}
KEY_VALUE_HEADS = {"tiny": 2, "0.5b": 2, "1.5b": 2, "7b": 4}
ALL_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ANSWER_CHARACTERS = 1500


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What an example is told on its command line."""

    model: str
    output: Path
    size: str
    steps: int
    batch: int
    accumulate: int
    length: int
    on_cpu: bool


def read_arguments(description: str, argv: list[str] | None = None) -> Arguments:
    """Return the arguments of an example; where no model is named, one is made below `--output`."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", help="a folder with a model and its tokenizer; made here if not given")
    parser.add_argument(
        "--output", type=Path, default=Path("fxopt-example"), help="checkpoints and the result"
    )
    parser.add_argument("--size", choices=[*SHAPES], default="0.5b", help="shape of the model that is made")
    parser.add_argument("--tiny", action="store_true", help="a model that trains on a CPU in seconds")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2, help="sequences of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--length", type=int, help="most tokens of a sequence, 1024 or with --tiny 128")
    given = parser.parse_args(argv)
    size = "tiny" if given.tiny else given.size
    model = given.model or make_model(given.output / f"base-{size}", size)
    return Arguments(
        model=str(model),
        output=given.output,
        size=size,
        steps=given.steps,
        batch=given.batch,
        accumulate=given.accumulate,
        length=given.length or (128 if given.tiny else 1024),
        on_cpu=not torch.cuda.is_available(),
    )


def make_chats() -> Dataset:
    """Return one question and answer per part of each topic of Python's manual."""
    rows: list[dict[str, Any]] = []
    for topic, text in sorted(topics.topics.items()):
        parts = [text[start : start + ANSWER_CHARACTERS] for start in range(0, len(text), ANSWER_CHARACTERS)]
        for number, part in enumerate(parts, 1):
            question = f"What does the Python manual say about {topic}, part {number} of {len(parts)}?"
            rows.append(
                {
                    "prompt": [{"role": "user", "content": question}],
                    "completion": [{"role": "assistant", "content": part.strip()}],
                }
            )
    return Dataset.from_list(rows)


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on the manual, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in sorted(topics.topics.items())), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(folder: Path, size: str) -> Path:
    """Write a model of random weights and its tokenizer to `folder`, unless they are there, and return `folder`."""
    if (folder / "config.json").exists():
        return folder
    tokenizer = make_tokenizer(512 if size == "tiny" else 8192)
    config = Qwen2Config(
        **SHAPES[size],
        num_key_value_heads=KEY_VALUE_HEADS[size],
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def find_checkpoint(output: Path) -> str | None:
    """Return the last checkpoint below `output`, or None: the same command again goes on from there."""
    return get_last_checkpoint(str(output)) if output.is_dir() else None


def answer(model: Any, folder: str, question: str, tokens: int = 24) -> str:
    """Return what `model` says to `question`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    said = model.eval().generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
