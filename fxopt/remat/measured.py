"""What the costly ops of joint graphs take on the device that is there: each timed once, then read from a file.

Only single ops are timed, never a block or a step, so a prediction stays one. What is not timed costs its roofline:
what Inductor fuses, ops whose work hangs on the values they are given, and what there was no memory or time for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxopt.graph.backward import find_backward
from fxopt.graph.quantized import arguments_of
from fxopt.graph.sizes import span_of
from fxopt.graph.storage import key_of as storage_of
from fxopt.graph.torch_private import registered_name, schema_of, size_seen
from fxopt.remat.cost import (
    FUSIBLE,
    PICOSECONDS,
    Declarations,
    bytes_in,
    cost_of,
    flops_of,
    op_of,
    tensors_in,
    workspace_of,
)
from fxopt.remat.devices import Device
from fxopt.remat.timings import Timing, read_timings, write_timings

OURS = "fxopt"
HANGS = "its work hangs on whole numbers that it is given"
HOST = "the host launches it too slowly to see how long it runs"
RANKS = "ranks that train one model have to plan alike"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A node to be timed, the bytes of all that it reads, writes and holds, and whether backward runs it.

    `own` are those of the nodes that it reads whose values lie in the model's own tensors.
    """

    node: fx.Node
    bytes: int
    in_backward: bool
    own: frozenset[fx.Node] = frozenset()


Timer = Callable[[Sequence[Trial], int], Iterable[Timing | str]]
"""Takes trials, and the bytes that an op of the step needs anyway; gives of each its timing, or why there is none."""


class Measured:
    """The timings of one device, kept in the file at `path`; without a timer there are none, and `without` says why."""

    def __init__(self, timer: Timer | None = None, path: Path | None = None, without: str = "") -> None:
        self._timer, self._path = timer, path
        self._known = {} if timer is None or path is None else read_timings(path)
        self._refused: dict[str, str] = {}
        self._left: dict[str, set[str]] = {without: {"every op"}} if without else {}

    @property
    def left(self) -> tuple[str, ...]:
        """The ops that cost their roofline although they are of a kind that is timed, with the reasons."""
        return tuple(f"{', '.join(sorted(ops))}: {reason}" for reason, ops in sorted(self._left.items()))

    def find_costs(
        self, graph: fx.Graph, held: Collection[int], device: Device, declared: Declarations
    ) -> dict[fx.Node, int]:
        """Return the picoseconds of those nodes of a joint graph that were timed, now or before."""
        if self._timer is None:
            return {}
        keys = {node: self._key_of(node, declared) for node in graph.nodes if is_timed(node)}
        settled = {*self._known, *self._refused}
        missing = {key: node for node, key in keys.items() if key not in settled}
        if missing:
            inputs = enumerate(graph.find_nodes(op="placeholder"))
            own = {storage_of(value) for n, node in inputs if n in held for value in _tensors(node)}
            in_step = max(_num_bytes(node, declared, own) for node in graph.nodes)
            backward = find_backward(list(graph.nodes))
            ordered = sorted(missing.items(), key=lambda item: -cost_of(item[1], device, declared))
            trials = [
                Trial(node, _num_bytes(node, declared), node in backward, _held_by(node, own))
                for _, node in ordered
            ]
            self._note([key for key, _ in ordered], self._timer(trials, in_step))
        found: dict[fx.Node, int] = {}
        for node, key in keys.items():
            timing = self._known.get(key)
            if timing is not None:
                found[node] = max(1, int(timing.ms * 1e-3 * PICOSECONDS))
            else:
                self._left.setdefault(self._refused[key], set()).add(registered_name(node.target))
        return found

    def _key_of(self, node: fx.Node, declared: Declarations) -> str:
        """Return what the time of `node` depends on; where it cannot be timed, that is noted."""
        try:
            key = key_of(node)
        except ValueError as error:  # a size that is known when it runs
            key = f"{node.target}: {error}"
            self._refused[key] = str(error)
        labels = _labels_of(node, declared)
        sources = (source for source in node.all_input_nodes if source not in labels)
        if any(_decides_work(value) for source in sources for value in _tensors(source)):
            self._refused[key] = HANGS
        return key

    def _note(self, keys: list[str], results: Iterable[Timing | str]) -> None:
        made: dict[str, Timing] = {}
        for key, result in zip(keys, results, strict=True):
            if isinstance(result, str):
                self._refused[key] = result
            else:
                made[key] = result
        self._known |= made
        if made and self._path is not None:
            write_timings(self._path, made)


ROOFLINES = Measured()
"""Where nothing can be timed: on a CPU, and for a device that is not here."""


def is_timed(node: fx.Node) -> bool:
    """Return whether `node` is an op of torch's or fxopt's worth a timing: a product, an attention, one of fxopt's."""
    op = op_of(node)
    if op is None or op.namespace not in (*FUSIBLE, OURS) or schema_of(op).is_mutable:
        return False
    return op.namespace == OURS or flops_of(node) > 0


def key_of(node: fx.Node) -> str:
    """Return what the time of `node` depends on: its op, the forms of its operands, and its attributes.

    Raises:
        ValueError: a size hangs on the values of a tensor.
    """
    args, kwargs = fx.map_arg(node.args, _form_of), fx.map_arg(node.kwargs, _form_of)
    return f"{registered_name(node.target)} {args} {kwargs}"


def _form_of(node: fx.Node) -> Any:
    value = _value(node)
    if isinstance(value, torch.SymInt):
        return size_seen(value)
    if not isinstance(value, torch.Tensor):
        return value
    shape, strides = (list(map(size_seen, sizes)) for sizes in (value.shape, value.stride()))
    return f"{value.dtype} {shape} {strides} {value.device.type}"


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    return tensors_in(_value(node))


def _labels_of(node: fx.Node, declared: Declarations) -> tuple[Any, ...]:
    known = declared.get(node.target)
    if known is None or not known.labels:
        return ()
    arguments = arguments_of(node)
    return tuple(arguments[name] for name in known.labels)


def _decides_work(value: torch.Tensor) -> bool:
    """Return whether what an op does may hang on the values of one operand: places, ends of groups, labels.

    A single number is the seed of dropout; bytes are codes, of which any are right.
    """
    if value.is_floating_point() or value.dtype in (torch.bool, torch.uint8, torch.uint64):
        return False
    return value.ndim > 0 and 0 not in value.shape


def _held_by(node: fx.Node, storages: Collection[int]) -> frozenset[fx.Node]:
    """Return which of the nodes that `node` reads lie in `storages`."""
    return frozenset(
        source
        for source in node.all_input_nodes
        if _tensors(source) and all(storage_of(value) in storages for value in _tensors(source))
    )


def _num_bytes(node: fx.Node, declared: Declarations, without: Collection[int] = ()) -> int:
    """Return the bytes that live while `node` runs: what it reads, but for the storages `without`, gives and holds."""
    if node.op != "call_function":
        return 0
    read = [value for source in node.all_input_nodes for value in _tensors(source)]
    spans = (span_of(value) * value.element_size() for value in read if storage_of(value) not in without)
    return sum(spans) + bytes_in(node) + workspace_of(node, declared)
