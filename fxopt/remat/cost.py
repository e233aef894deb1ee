"""What a node of a joint graph costs to run, by roofline: its products, or what it reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from fxopt.graph.sizes import num_bytes_of, number_of
from fxopt.remat.devices import BANDWIDTH_SHARE, GEMM_SHARE, Device

PICOSECONDS = 1e12
ATTENTION = frozenset(
    getattr(torch.ops.aten, f"_scaled_dot_product_{backend}_attention{way}")
    for backend in ("flash", "efficient", "cudnn")
    for way in ("", "_backward")
)
"""Torch's attention, whose keys may have fewer heads than its queries."""
FUSIBLE = ("aten", "prims")
"""Namespaces whose pointwise ops Inductor computes within the kernel that reads them."""


class InPlace(Protocol):
    """A form of an op that leaves some of its results in arguments, which its schema says it writes to."""

    @property
    def op(self) -> Any:
        """The form, which takes the arguments of the op."""
        ...

    @property
    def results(self) -> dict[int, str]:
        """The results that it leaves, by their numbers, and in which argument."""
        ...


class Declared(Protocol):
    """What an op says of itself beside its floating-point operations; functions take its arguments."""

    @property
    def workspace(self) -> Callable[..., int] | None:
        """The most bytes that it holds for itself."""
        ...

    @property
    def moved(self) -> Callable[..., int] | None:
        """The bytes that it moves beside its large products, which wait for that."""
        ...

    @property
    def share(self) -> float | None:
        """What its products reach of the datasheet's; None: what large ones do."""
        ...

    @property
    def launches(self) -> Callable[..., int] | None:
        """The kernels that one call runs; None: one."""
        ...

    @property
    def rows(self) -> tuple[str, ...]:
        """The arguments whose rows it never mixes: some of these give some of its results, or partial sums."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The arguments of whole numbers that change nothing about its work."""
        ...

    @property
    def known(self) -> Any:
        """The op that copies the first rows of its result for an argument `known`, or None."""
        ...

    @property
    def in_place(self) -> Sequence[InPlace]:
        """Its forms that write to arguments which nobody reads afterwards, the most frugal first."""
        ...


Declarations = Mapping[Any, Declared]


def cost_of(
    node: fx.Node, device: Device, declared: Declarations, reads: Iterable[fx.Node] | None = None
) -> int:
    """Return the picoseconds that `node` takes on `device`; what its kernel `reads` is not always its operands."""
    moved = sum(map(bytes_in, node.all_input_nodes if reads is None else reads)) + bytes_in(node)
    bandwidth = device.bandwidth * BANDWIDTH_SHARE
    seconds = moved / bandwidth
    known = declared.get(node.target)
    flops = flops_of(node)
    if flops:
        rate = device.half_flops if multiplies_narrowly(node) else device.single_flops
        share = GEMM_SHARE if known is None or known.share is None else known.share
        seconds = max(seconds, flops / (rate * share))
        if known is not None and known.moved is not None:
            seconds += count(node, known.moved) / bandwidth
    return int(seconds * PICOSECONDS) + launches_of(node, declared) * device.launch_ps


def launches_of(node: fx.Node, declared: Declarations) -> int:
    """Return how many kernels the op of `node` runs, as far as it says: else one."""
    known = declared.get(node.target)
    return 1 if known is None or known.launches is None else count(node, known.launches)


def multiplies_narrowly(node: fx.Node) -> bool:
    """Return whether `node` multiplies in 16 bits: where anything it reads or writes has so many."""
    values = [value for other in (node, *node.all_input_nodes) for value in tensors_in(_value_of(other))]
    return any(value.dtype.is_floating_point and value.dtype.itemsize < 4 for value in values)


def flops_of(node: fx.Node) -> int:
    """Return the floating-point operations of a matrix product or of an op that declares them, else 0.

    Declared with `torch.utils.flop_counter`, as torch does for its own.
    """
    target: Any = node.target
    formula = flop_registry.get(getattr(target, "overloadpacket", None))
    if formula is None:
        return 0
    args: Any = fx.map_arg(node.args, _value_of)
    kwargs: Any = fx.map_arg(node.kwargs, _value_of)
    if target.overloadpacket in ATTENTION:
        args = map(_spread_heads(args), args)
    return number_of(formula(*args, **kwargs, out_val=node.meta.get("val")))


def _spread_heads(args: Iterable[Any]) -> Callable[[Any], Any]:
    """Return what gives each [B, H, T, D] tensor the largest H of those among `args`, and all else as it is.

    Torch 2.11 counts attention only where keys have as many heads as queries.
    """
    heads = max((arg.shape[1] for arg in args if _has_heads(arg)), default=1)
    return lambda arg: arg[:, :1].expand(-1, heads, -1, -1) if _has_heads(arg) else arg


def _has_heads(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4


def workspace_of(node: fx.Node, declared: Declarations, op: Any = None) -> int:
    """Return what the op of `node`, or another `op` of its arguments, holds for itself while it runs, in bytes."""
    known = declared.get(node.target if op is None else op)
    return 0 if known is None or known.workspace is None else count(node, known.workspace)


def count(node: fx.Node, declared: Callable[..., int]) -> int:
    """Return what a declaration of its op comes to for the arguments of `node`."""
    return number_of(declared(*fx.map_arg(node.args, _value_of), **fx.map_arg(node.kwargs, _value_of)))


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
