"""Random inputs for the stock arithmetic of a match: of its dtypes, devices and layouts, in the sizes given.

All random numbers come from generators of their own.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.graph import vocabulary
from fxopt.graph.arguments import same_size
from fxopt.graph.sizes import number_of
from fxopt.graph.view import is_tensor
from fxopt.rewriting.pattern import Match
from fxopt.rewriting.proof_sizes import WEIGHT_RANK, Sizes, is_stack_of_matrices, is_weight

INPUT_SEED, GRADIENT_SEED = 20240229, 20240301


class Layout(NamedTuple):
    """How a tensor lies in memory: its dims from the outermost to the innermost, which of them repeat the
    same items, and the step between neighbours, 2 standing for any larger than 1."""

    order: tuple[int, ...]
    expanded: frozenset[int]
    step: int


def layout_of(value: torch.Tensor) -> Layout:
    """Return the layout of `value`, its symbolic strides read by their hints."""
    strides = [number_of(stride) for stride in value.stride()]
    expanded = frozenset(dim for dim, stride in enumerate(strides) if stride == 0)
    order = sorted(range(len(strides)), key=lambda dim: (dim in expanded, strides[dim]), reverse=True)
    stored = [stride for dim, stride in enumerate(strides) if number_of(value.shape[dim]) > 1 and stride]
    return Layout(tuple(order), expanded, 2 if min(stored, default=1) > 1 else 1)


class Sampler:
    """Random values for the inputs of one match, drawn without touching the user's random state."""

    def __init__(self, match: Match, sizes: Sizes, seed: int = INPUT_SEED) -> None:
        self._seed = seed
        self._match = match
        self._sizes = sizes
        values = (node.meta["example_value"] for node in match.inputs if is_tensor(node))
        self._lengths = [v.shape[0] for v in values if v.dim() == 1 and not v.is_floating_point()]
        self._generators: dict[torch.device, torch.Generator] = {}

    def sample(self, node: fx.Node) -> Any:
        """Return a value for the input `node`."""
        example = node.meta.get("example_value")
        if not isinstance(example, torch.Tensor):
            return example if not isinstance(example, torch.SymInt) else self._sizes.of(example)
        if example.dtype == torch.bool:
            return self._uniform(self._shape(node), torch.float32, example.device) < 0.5
        if example.is_complex():
            parts = (self._normal(self._shape(node), example.real.dtype, example.device) for _ in range(2))
            return torch.complex(*parts)
        if not example.is_floating_point():
            return self._integers(node, example)
        return self._floats(node, example)

    def like(self, value: torch.Tensor) -> torch.Tensor:
        """Return normal numbers in the form of `value`."""
        return self._normal(tuple(value.shape), value.dtype, value.device)

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        example = node.meta["example_value"]
        if is_weight(node):
            return self._sizes.of_weight(example.shape)
        if is_stack_of_matrices(node):
            return (self._sizes.of(example.shape[0]), *example.shape[1:])
        is_number = example.is_floating_point() or example.is_complex()
        if not is_number or self._is_list(example):
            return tuple(self._sizes.of(size) for size in example.shape)
        return self._sizes.of_shape(example.shape)

    def _is_list(self, example: torch.Tensor) -> bool:
        """Return whether floats are one for each integer of a list of them."""
        return example.dim() == 1 and any(same_size(example.shape[0], length) for length in self._lengths)

    def _floats(self, node: fx.Node, example: torch.Tensor) -> torch.Tensor:
        shape = self._shape(node)
        if not shape:
            return self._uniform(shape, example.dtype, example.device) + 1.0
        layout = layout_of(example)
        stored = [1 if dim in layout.expanded else shape[dim] for dim in layout.order]
        stored[-1] *= layout.step
        dense = self._normal(tuple(stored), example.dtype, example.device)
        if is_weight(node) and len(shape) == WEIGHT_RANK:
            dense.div_(math.sqrt(shape[-1]))
        if is_stack_of_matrices(node):
            dense.div_(math.sqrt(max(shape[1:])))
        dense = dense[..., :: layout.step]
        return dense.permute([layout.order.index(dim) for dim in range(len(shape))]).expand(shape)

    def _integers(self, node: fx.Node, example: torch.Tensor) -> torch.Tensor:
        loss = self._find_loss(node)
        shape = self._shape(node)
        if loss is None:
            bound = self._find_bound(node)
            if bound is not None:
                return (self._uniform(shape, torch.float64, example.device) * bound).to(example.dtype)
            high = 255 if example.dtype == torch.uint8 else 8
            return (self._uniform(shape, torch.float32, example.device) * high + 1).to(example.dtype)
        classes = number_of(loss.args[0].meta["example_value"].shape[-1])
        num_classes = self._sizes.classes.get(classes, classes)
        values = (self._uniform(shape, torch.float64, example.device) * num_classes).to(example.dtype)
        flat = values.reshape(-1)
        ignore_index = loss.kwargs.get("ignore_index", -100)
        if isinstance(ignore_index, int) and flat.numel() > 1:
            flat[1::3] = ignore_index
        return flat.reshape(shape)

    def _find_loss(self, node: fx.Node) -> Any:
        """Return the loss that reads `node` as its labels, through views and casts; None if there is none."""
        labels = {node}
        for inner in self._match.nodes:
            if inner.target is F.cross_entropy and inner.args[1] in labels:
                return inner
            if inner.target in VIEWS and inner.args[0] in labels:
                labels.add(inner)
        return None

    def _find_bound(self, node: fx.Node) -> int | None:
        """Return how many things `node` may name, where its integers count into bins or pick items; else None."""
        names = {node}
        for inner in self._match.nodes:
            if inner.target is torch.histc and inner.args[0] in names:
                return self._sizes.of(inner.kwargs["bins"])
            picks = inner.target is operator.getitem and inner.args[1] in names
            if picks and isinstance(inner.args[0], fx.Node) and is_tensor(inner.args[0]):
                return self._sizes.of(inner.args[0].meta["example_value"].shape[0])
            keeps = inner.target in (*VIEWS, torch.sort, torch.clamp) and inner.args[0] in names
            if keeps and (inner.target is not operator.getitem or inner.args[1] == 0):
                names.add(inner)
        return None

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def _normal(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=self._generator(device))

    def _uniform(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.rand(shape, dtype=dtype, device=device, generator=self._generator(device))


VIEWS = frozenset(
    {vocabulary.reshape, vocabulary.contiguous, vocabulary.cast, vocabulary.BY_NAME["getitem"].target}
)
