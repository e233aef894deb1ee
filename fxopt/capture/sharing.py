"""Mappings that a model hands from block to block (shared keys and values), seen through by Dynamo.

A block is one leaf of the captured model, and takes tensors, plain values and containers of these. What it puts
into a mapping on the way would be lost there: the leaf is given the mapping's items, a second call returns what it
put in, and code that Dynamo traces puts that into the mapping.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch

from fxopt.capture import torch_dynamo
from fxopt.capture.stand_in import StandIns


def share_mappings(leaf: Callable[..., Any], stand_ins: StandIns) -> Callable[..., Any]:
    """Return `leaf` so that mappings among its arguments hold, while Dynamo traces, what the block puts in."""
    take = torch_dynamo.mark_leaf(_make_take(stand_ins))

    @torch.compiler.assume_constant_result
    def find_keys() -> tuple[tuple[Any, ...], ...]:
        return stand_ins.keys_put

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return leaf(*args, **kwargs)
        mappings = [value for value in (*args, *kwargs.values()) if _is_mapping(value)]
        if not mappings:
            return leaf(*args, **kwargs)
        out = leaf(
            *[_items_of(value) for value in args],
            **{name: _items_of(value) for name, value in kwargs.items()},
        )
        all_keys = find_keys()
        values = take(out) if any(all_keys) else ()
        place = 0
        for mapping, keys in zip(mappings, all_keys, strict=True):
            for key in keys:
                mapping[key] = values[place]
                place += 1
        return out

    return call


def _make_take(stand_ins: StandIns) -> Callable[..., Any]:
    def take_put(out: Any) -> Any:
        return stand_ins.values_put

    take_put.fxopt_put = True  # pyright: ignore[reportFunctionMemberAccess]
    return take_put


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict | collections.UserDict)


def _items_of(value: Any) -> Any:
    return value.data if isinstance(value, collections.UserDict) else value
