"""Values for ops that are timed: the model's own tensors where one can be an operand, random ones elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.graph.sizes import make_seen, span_of
from fxopt.remat.measured import Trial


class OwnTensors:
    """The model's own tensors on one device: what an op reads of them need not be made for a timing."""

    def __init__(self, tensors: Sequence[torch.Tensor], place: torch.device) -> None:
        plain = (tensor for tensor in tensors if type(tensor) in (torch.Tensor, torch.nn.Parameter))
        there = (tensor.detach() for tensor in plain if tensor.device == place and tensor.is_contiguous())
        self._tensors = sorted(there, key=torch.Tensor.numel)

    def serve(self, trial: Trial) -> dict[fx.Node, torch.Tensor]:
        """Return a value for each of the trial's own operands that one of the tensors can be, none of them twice."""
        left = list(self._tensors)
        found: dict[fx.Node, torch.Tensor] = {}
        for node in sorted(trial.own):
            value = node.meta["val"]
            if not isinstance(value, torch.Tensor):
                continue
            needed = span_of(value)
            fit = (n for n, each in enumerate(left) if each.dtype == value.dtype and each.numel() >= needed)
            place = next(fit, None)
            if place is not None:
                source = left.pop(place)
                found[node] = make_seen(
                    value,
                    lambda _, sizes, strides, source=source: source.as_strided(
                        sizes, strides, source.storage_offset()
                    ),
                )
        return found

    def spared_by(self, trial: Trial) -> int:
        """Return the bytes of the operands that are served."""
        return sum(span_of(value) * value.element_size() for value in self.serve(trial).values())


def call_of(trial: Trial, own: OwnTensors) -> Callable[[], Any]:
    """Return a call of the trial's op on values of the forms that it will get: the model's own, the others random."""
    target: Any = trial.node.target
    served = own.serve(trial)

    def value_of(node: fx.Node) -> Any:
        return served[node] if node in served else make_value(node)

    args, kwargs = fx.map_arg(trial.node.args, value_of), fx.map_arg(trial.node.kwargs, value_of)
    return lambda: target(*args, **kwargs)


def make_value(node: fx.Node) -> Any:
    """Return a value of the form that `node` will have, its items random.

    All bytes are valid codes, masks hide nothing, and other whole numbers, seeds of random generators, are zero.
    """

    def make(value: torch.Tensor, sizes: list[int], strides: list[int]) -> torch.Tensor:
        flat = torch.empty(span_of(value), dtype=value.dtype, device=value.device)
        if value.is_floating_point():
            flat.normal_()
        elif value.dtype == torch.uint8:
            flat.random_()
        else:
            flat.fill_(value.dtype == torch.bool)
        return flat.as_strided(sizes, strides)

    return make_seen(node.meta["val"], make)
