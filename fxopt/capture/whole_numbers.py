"""Whole numbers that have values on the meta device: positions, and the masks that are computed from them.

A model's forward looks at the values of masks, to leave out the one that a plain causal attention needs none of.
Positions come from sizes alone, so their values are known where nothing else has any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxopt.graph.torch_private import DispatchMode, schema_of, tree_leaves, tree_map

MOST_ITEMS = 1 << 24
"""A larger tensor has no values."""
VALUES = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
"""Tags of ops that give nothing without values."""
CPU, META = torch.device("cpu"), torch.device("meta")


class WholeNumbers(DispatchMode):
    """Within it, what is made of sizes alone lies on a CPU where meta was asked for; all else stays on meta."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = [tensor for tensor in tensors if not tensor.is_meta]
        if not known and (tensors or kwargs.get("device") != META):
            return func(*args, **kwargs)
        if schema_of(func).is_mutable and len(known) < len(tensors):
            raise NotImplementedError(f"{func}: of what it reads and writes only a part has values")
        if len(known) < len(tensors) or not _has_values(func, args, kwargs, is_made=not tensors):
            return func(*on_meta(args), **on_meta(kwargs))
        return func(*args, **({**kwargs, "device": CPU} if "device" in kwargs else kwargs))


def on_meta(value: Any) -> Any:
    """Return `value` with a tensor without values, of the same form, in place of each tensor in it."""

    def form(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        made = torch.empty_strided(tuple(leaf.shape), leaf.stride(), dtype=leaf.dtype, device=META)
        return made.requires_grad_(leaf.requires_grad)

    return tree_map(form, value)


def _has_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_made: bool) -> bool:
    """Return whether results get values: where they are not too large and, made anew, whole numbers that are set."""
    if is_made and (torch.Tag.nondeterministic_seeded in func.tags or "empty" in schema_of(func).name):
        return False
    if schema_of(func).is_mutable or not VALUES.isdisjoint(func.tags):
        return True
    formed = tree_leaves(func(*on_meta(args), **on_meta(kwargs)))
    tensors = [leaf for leaf in formed if isinstance(leaf, torch.Tensor)]
    is_small = all(tensor.numel() <= MOST_ITEMS for tensor in tensors)
    return is_small and not (is_made and any(tensor.is_floating_point() for tensor in tensors))
