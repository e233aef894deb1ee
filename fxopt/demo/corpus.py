"""Batches of real English that every machine has: the topics of Python's own manual, `pydoc_data.topics`."""

from __future__ import annotations

from pydoc_data import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def read_corpus() -> str:
    """Return the text of all topics of Python's manual, in order of their names: about 465 KB.

    >>> "import" in read_corpus()
    True
    """
    return "\n\n".join(text for _, text in sorted(topics.topics.items()))


def train_tokenizer(text: str, vocabulary_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer trained on `text`; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,  # pyright: ignore[reportCallIssue]
        special_tokens=["<pad>", "<bos>", "<eos>"],  # pyright: ignore[reportCallIssue]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # pyright: ignore[reportCallIssue]
        show_progress=False,  # pyright: ignore[reportCallIssue]
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return tokenizer


def make_batches(
    tokens: torch.Tensor, *, num_batches: int, batch_size: int, length: int, seed: int
) -> list[torch.Tensor]:
    """Return `num_batches` int64 tensors [batch_size, length]: random windows of `tokens`, by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length, (num_batches, batch_size), generator=generator)
    return list(tokens[starts[..., None] + torch.arange(length)])
