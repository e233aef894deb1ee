"""Train a model for some steps and measure: losses, step times, bytes saved for backward."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEARNING_RATE = 3e-4


@dataclasses.dataclass(frozen=True)
class Run:
    """What one training run gave; `saved_bytes` is of one step, after the last one that counts."""

    losses: tuple[float, ...]
    step_ms: tuple[float, ...]
    saved_bytes: int

    @property
    def median_step_ms(self) -> float:
        """The median over all steps but the first, which compiles."""
        return statistics.median(self.step_ms[1:] or self.step_ms)


@dataclasses.dataclass
class SavedBytes:
    """What `count_saved_bytes` counts: bytes of distinct storages, each once."""

    total: int = 0


@contextlib.contextmanager
def count_saved_bytes(model: torch.nn.Module) -> Iterator[SavedBytes]:
    """Count what autograd saves for backward inside the `with`, without `model`'s parameters and buffers.

    Views of one storage count once, with the bytes of the whole storage, since that is what stays alive.

    >>> layer = torch.nn.Linear(4, 4)
    >>> with count_saved_bytes(layer) as saved:
    ...     loss = layer(torch.ones(2, 4, requires_grad=True)).exp().sum()
    >>> saved.total  # the input and the result of exp, two rows of four floats each
    64
    """
    saved = SavedBytes()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, torch.UntypedStorage] = {}  # holds the storages, or an address could be used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in own and address not in seen:
            seen[address] = storage
            saved.total += storage.nbytes()
        return tensor.detach() if tensor.grad_fn else tensor  # a result would hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def train(
    model: torch.nn.Module,
    batches: Sequence[torch.Tensor],
    *,
    dtype: str,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Run:
    """Train `model` by AdamW on `batches`, one step each, and measure; `on_step` gets each loss.

    Weights stay as they are; `dtype` other than fp32 means autocast, and for fp16 a scaled loss.
    """
    device = next(model.parameters()).device
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")

    def forward_loss(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
            outputs: Any = model(input_ids=batch, labels=batch)
        return outputs.loss

    losses: list[float] = []
    step_ms: list[float] = []
    for batch in batches:
        batch = batch.to(device)
        start = time.perf_counter()
        loss = forward_loss(batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for the device, so the time is of the whole step
        step_ms.append((time.perf_counter() - start) * 1e3)
        on_step(losses[-1])

    with count_saved_bytes(model) as saved:
        loss = forward_loss(batches[-1].to(device))
    return Run(tuple(losses), tuple(step_ms), saved.total)
