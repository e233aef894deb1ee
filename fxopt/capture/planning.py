"""What capture asks of a planner: which variant of a block serves a call, and what its joint graph shall save.

The pipeline brings a planner; capture knows it by this face alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx

from fxopt.capture.modules import tensors_of
from fxopt.graph.storage import UNKNOWN, joint_key_of

OFFLOAD = "offload"
"""Where the meta of a saved value says that it leaves for the host; the planner tags it in the joint graph."""


class Leaving:
    """Which of the tensors that a forward graph saves leave the device, numbered from the last one saved."""

    def __init__(self) -> None:
        self.numbers: frozenset[int] = frozenset()

    def read(self, graph: fx.Graph) -> None:
        """Read the tags of a forward graph that was split from a joint one: its results, then what it saves.

        Torch saves a view in place of the value that is tagged where backward reads nothing but the view.
        """
        outputs: list[Any] = list(graph.output_node().args[0])  # pyright: ignore
        saved = [node for node in outputs if _is_saved_by_autograd(node)]
        gone = {joint_key_of(node) for node in graph.nodes if node.meta.get(OFFLOAD)} - {None, UNKNOWN}
        self.numbers = frozenset(
            number for number, node in enumerate(reversed(saved)) if joint_key_of(node) in gone
        )


def _is_saved_by_autograd(node: Any) -> bool:
    """Return whether an output is a tensor; sizes, and tensors that may be written to, are kept in other places."""
    if not isinstance(node, fx.Node) or node.meta.get("saved_tensor_with_no_vc_check", False):
        return False
    return isinstance(node.meta.get("val"), torch.Tensor)


class Offload(Protocol):
    """What carries out that values wait on the host."""

    def wrap(self, compiled: Callable[..., Any], leaving: Leaving) -> Callable[..., Any]:
        """Return a compiled graph so that the values `leaving` leave after each call of it."""
        ...


@dataclasses.dataclass(frozen=True)
class Mark:
    """What is shown a joint graph, with the numbers of its inputs that are the model's own.

    It returns what tells its plan apart. Where it `decides`, it tags what is saved and what computed again; else the
    graph has the tags that it has where nobody plans. `offload` carries out what it wants on the host.
    """

    show: Callable[[fx.Graph, frozenset[int]], str]
    decides: bool = True
    offload: Offload | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """A block's call that asks for a plan: the tokens it is given, and whether checkpointing is switched on."""

    tokens: int
    checkpointed: bool


class Planner(Protocol):
    """Decides per block what is saved for backward; None stands for what is done where nobody plans."""

    @property
    def plans(self) -> tuple[Any, ...]:
        """The plans carried out so far, as records."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What those do not count, and why."""
        ...

    @property
    def limits(self) -> dict[str, int]:
        """What this rank's device has, by name."""
        ...

    def agree(self, limits: dict[str, int]) -> None:
        """Plan for the least that a rank has."""
        ...

    def is_asked(self, *, checkpointed: bool) -> bool:
        """Return whether calls are planned, with gradient checkpointing switched on or not."""
        ...

    def find_variant(self, path: str, call: Call) -> int | None:
        """Return the number of the variant that serves the block at `path`, or None."""
        ...

    def mark_block(self, path: str, variant: int, call: Call, graph: fx.Graph, held: frozenset[int]) -> str:
        """Tag the joint graph of a block for its plan."""
        ...

    def form_of(self, path: str) -> Any:
        """Return what tells the captured form of the block at `path` from others."""
        ...

    def note_form(self, path: str, form: Any) -> None:
        """Note that a graph of `form` serves the block at `path`."""
        ...

    @property
    def host_bytes(self) -> int:
        """The most that a plan keeps on the host."""
        ...

    @property
    def host_limit(self) -> int:
        """The most that may be reserved on the host."""
        ...

    @property
    def num_tokens(self) -> int:
        """The tokens of the call that runs."""
        ...

    def is_too_much(self, kept_bytes: int, working: int) -> bool:
        """Return whether a step does not fit whose blocks keep so much each, and once `working` times that."""
        ...

    def describe_last(self) -> str:
        """Return the figures of the plan of the last call, in one line; "no plan" where it had none."""
        ...

    def lower(self) -> str | None:
        """Make the plan for calls like the last one need less, and return its figures; None where none does."""
        ...

    def begin_tail(self) -> None:
        """Expect the pieces of what stands after the blocks, captured anew."""
        ...

    def read_tail(self, graph: fx.Graph, held: frozenset[int]) -> str:
        """Read the joint graph of a piece of what stands after the blocks."""
        ...


def call_of(args: tuple[Any, ...], kwargs: dict[str, Any], checkpointed: bool) -> Call:
    """Return what a plan needs to know of a block's call: its first tensor has a row per token."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim > 1:
            return Call(value.shape[:-1].numel(), checkpointed)
    return Call(1, checkpointed)


def note_held(gm: fx.GraphModule, values: list[Any], model: torch.nn.Module) -> None:
    """Note at the inputs of `gm`, whose values are `values`, which of them are tensors of `model`."""
    own = {id(tensor) for tensor in tensors_of(model)}
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, values, strict=True):
        node.meta["held"] = id(value) in own or isinstance(value, torch.nn.Parameter)


def held_by_model(gm: fx.GraphModule) -> frozenset[int]:
    """Return the numbers of the inputs of `gm` that `note_held` found."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return frozenset(number for number, node in enumerate(placeholders) if node.meta.get("held"))


def with_mark(lower: Callable[..., Any], mark: Mark | None) -> Callable[..., Any]:
    """Return `lower` so that what it compiles is tagged by `mark`."""
    return lower if mark is None else functools.partial(lower, mark=mark)


def with_offload(compiled: Callable[..., Any], mark: Mark | None, leaving: Leaving) -> Callable[..., Any]:
    """Return what was compiled so that the values `leaving` wait on the host, if anybody carries that out."""
    return compiled if mark is None or mark.offload is None else mark.offload.wrap(compiled, leaving)
