"""The form of what a block returns, found by running it on random values: for blocks that look at values themselves."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import nn

from fxopt.capture import torch_modules
from fxopt.capture.engines import gathers
from fxopt.capture.given_lists import GivenLists
from fxopt.capture.recorders import Counts, run_collecting
from fxopt.capture.tail import TailRefusal
from fxopt.capture.writes_watched import WritesWatched
from fxopt.graph.torch_private import (
    size_seen,
    tree_leaves,
    tree_map,
    tree_map_only,
    unset_fake_temporarily,
)

SEEDS = (0, 1)
"""Of the values: a form that differs between them hangs on values, and is none."""


def try_on_values(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], counts: Counts = ()
) -> Any:
    """Return stand-ins of the form that `block` returns for these stand-in arguments, or None: that is not clear.

    With them comes what is collected on the way, by key, beyond what `counts` says is there.

    The block runs on random values of the sizes at this call, its buffers and the random states put back. Each
    tensor it returns must have the same sizes for all values, and, where the capture is for more than the sizes
    at this call, those of a tensor it was given.

    Raises:
        TailRefusal: the block writes to a list that it is given, or to a tensor that it keeps, beside its buffers.
    """
    results: list[Any] = []
    with unset_fake_temporarily(), torch.random.fork_rng(devices=_devices_of(block)):
        buffers = [(buffer, buffer.detach().clone()) for buffer in block.buffers() if not buffer.is_meta]
        for seed in SEEDS:
            torch.manual_seed(seed)
            try:
                real_args, real_kwargs = tree_map(_value_like, (args, kwargs))
                lists = GivenLists(real_args, real_kwargs)
                run = functools.partial(torch_modules.stock_call, block)
                given = [
                    each for each in tree_leaves((real_args, real_kwargs)) if isinstance(each, torch.Tensor)
                ]
                free = (*given, *(buffer for buffer, _ in buffers))
                with contextlib.nullcontext() if gathers(block) else WritesWatched(block, free):
                    results.append(run_collecting(run, counts, real_args, real_kwargs))
            except TailRefusal:
                raise
            except Exception:  # what the block said on stand-ins is told
                return None
            finally:
                with torch.no_grad():
                    for buffer, saved in buffers:
                        buffer.copy_(saved)
            lists.check(block)
    if tree_map(_form, results[0]) != tree_map(_form, results[1]):
        return None
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    made = tree_map_only(torch.Tensor, lambda value: _stand_in_like(value, given), results[0])
    return None if any(each is Unknown for each in tree_leaves(made)) else made


class Unknown:
    """Stands for a tensor whose sizes are those of none that the block was given."""


def _devices_of(block: nn.Module) -> list[torch.device]:
    devices = {tensor.device for tensor in (*block.parameters(), *block.buffers())}
    return [device for device in devices if device.type == "cuda"]


def _value_like(value: Any) -> Any:
    """Return random values for a stand-in: normal ones, zeros of integers (an index of everything), True of bools."""
    if isinstance(value, torch.SymInt):
        return size_seen(value)
    if not isinstance(value, torch.Tensor):
        return value
    shape = [size_seen(size) for size in value.shape]
    if value.is_floating_point() or value.is_complex():
        made = torch.randn(shape, dtype=value.dtype, device=value.device)
        return made.requires_grad_(value.requires_grad)
    fill = torch.ones if value.dtype is torch.bool else torch.zeros
    return fill(shape, dtype=value.dtype, device=value.device)


def _form(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    return value


def _stand_in_like(value: torch.Tensor, given: list[torch.Tensor]) -> Any:
    """Return a stand-in for `value` with the sizes of one of `given`, laid out in memory as `value` is."""
    shapes = [list(tensor.shape) for tensor in given]
    alike = [shape for shape in shapes if [*map(size_seen, shape)] == list(value.shape)]
    if all(isinstance(size, int) for shape in shapes for size in shape):
        alike.append(list(value.shape))  # the capture holds for these sizes only
    if not alike:
        return Unknown
    order = sorted(range(value.ndim), key=lambda dim: -value.stride(dim))
    stored = torch.empty([alike[0][dim] for dim in order], dtype=value.dtype, device=value.device)
    stand_in = stored.permute([order.index(dim) for dim in range(value.ndim)])
    return stand_in.requires_grad_(value.requires_grad) if value.is_floating_point() else stand_in
