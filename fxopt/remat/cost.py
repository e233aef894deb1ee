"""What a node of a joint graph costs to run, by roofline: its products, or what it reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from fxopt.graph.sizes import num_bytes_of, number_of
from fxopt.remat.devices import BANDWIDTH_SHARE, GEMM_SHARE, Device

PICOSECONDS = 1e12
FUSIBLE = ("aten", "prims")
"""Namespaces whose pointwise ops Inductor computes within the kernel that reads them."""


def cost_of(node: fx.Node, device: Device) -> int:
    """Return the picoseconds that `node` takes on `device`."""
    moved = sum(map(bytes_in, node.all_input_nodes)) + bytes_in(node)
    seconds = moved / (device.bandwidth * BANDWIDTH_SHARE)
    flops = flops_of(node)
    if flops:
        narrow = any(value.dtype.itemsize < 4 for value in tensors_in(node.meta.get("val")))
        rate = device.half_flops if narrow else device.single_flops
        seconds = max(seconds, flops / (rate * GEMM_SHARE))
    return int(seconds * PICOSECONDS) + device.launch_ps


def flops_of(node: fx.Node) -> int:
    """Return the floating-point operations of a matrix product or of an op that declares them, else 0.

    Declared with `torch.utils.flop_counter`, as torch does for its own.
    """
    target: Any = node.target
    formula = flop_registry.get(getattr(target, "overloadpacket", None))
    if formula is None:
        return 0
    args = fx.map_arg(node.args, _value_of)
    kwargs = fx.map_arg(node.kwargs, _value_of)
    return number_of(formula(*args, **kwargs, out_val=node.meta.get("val")))


def workspace_of(node: fx.Node, count: Callable[..., int]) -> int:
    """Return what `count` says that the op of `node` holds for itself while it runs, in bytes."""
    return number_of(count(*fx.map_arg(node.args, _value_of), **fx.map_arg(node.kwargs, _value_of)))


def op_of(node: fx.Node) -> Any:
    """Return the op that `node` calls, with its schema and its tags, or None: it calls no registered one."""
    target: Any = node.target
    return target if isinstance(target, torch._ops.OpOverload) else None  # pyright: ignore


def is_fusible(node: fx.Node) -> bool:
    """Return whether Inductor computes `node` within the kernel of what reads it."""
    op = op_of(node)
    return op is not None and op.namespace in FUSIBLE and torch.Tag.pointwise in op.tags


def _value_of(node: fx.Node) -> Any:
    return node.meta.get("val")


def bytes_in(node: fx.Node) -> int:
    """Return the bytes of the items that the value of `node` has, of all tensors where it is a tuple."""
    return sum(map(num_bytes_of, tensors_in(node.meta.get("val"))))


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a node's value: itself, or those of a tuple."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        items: list[Any] = list(value)  # pyright: ignore[reportUnknownArgumentType]
        return [item for item in items if isinstance(item, torch.Tensor)]
    return []
