"""What is private of the stand-in tensors that Dynamo traces with.

`tests/fxopt/capture/test_torch_stand_ins.py` fails in plain words when a torch version moves one of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree


def is_fake(value: object) -> bool:
    """Return whether `value` is a stand-in tensor, as Dynamo uses while it traces."""
    return isinstance(value, torch._subclasses.FakeTensor)


def holds_fake(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether the tensors among these arguments, at any depth, are stand-ins; they all are, or none is."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return is_fake(value)
    return any(is_fake(leaf) for leaf in pytree.tree_leaves((args, kwargs)))


def fake_mode_of(value: Any) -> Any:
    """Return the FakeTensorMode that the stand-in tensor `value` belongs to."""
    return value.fake_mode


def make_stand_in(mode: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Return a stand-in of `mode` for `tensor` that carries what was set on it (a packed weight's scales)."""
    stand_in = mode.from_tensor(tensor, static_shapes=True)
    for name, value in tensor.__dict__.items():
        stand_in.__dict__.setdefault(name, value)
    return stand_in


def make_whole_stand_in(
    mode: Any, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return a stand-in of `mode` for the whole of a `tensor` that is spread over ranks, as it is while gathered."""
    with mode:
        whole = torch.empty(shape, dtype=dtype, device=device)
    return whole.requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def real_tensors_allowed(mode: Any) -> Iterator[None]:
    """Let ops of `mode` read real tensors beside stand-ins within the scope, and drop the sizes made up in it.

    A size that hangs on values is a new symbol; torch asks for each in what is returned, unless told otherwise.
    """
    previous, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        with mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env else contextlib.nullcontext():
            yield
    finally:
        mode.allow_non_fake_inputs = previous
