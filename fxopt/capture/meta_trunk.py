"""The trunk of a model on the meta device: its blocks are called on the forms of what a step gives them.

The stock forward cannot run there, since blocks are given what was captured; but captured, transformers makes masks
that the stock forward leaves out once it has looked at them. So it is run with blocks that do nothing, to see which.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fxopt.capture.whole_numbers import WholeNumbers, on_meta

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one call of a block."""


class BlocksDone(BaseException):
    """Raised when the last block was given its arguments; not an Exception, so that nothing swallows it."""


class MetaTrunk(threading.local):
    """Runs one model's stock forward up to its last block, none of which runs; each thread sees only its own run."""

    def __init__(self, model: nn.Module, tell: Callable[[str], None]) -> None:
        self.model = model
        self._tell = tell
        self._given: list[Given] | None = None
        self._values: list[Any] = []

    @property
    def is_running(self) -> bool:
        """Whether the stock forward is being run right now, so that a nested call of the model is a stock one."""
        return self._given is not None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], calls: tuple[fx.Node, ...]) -> list[Any]:
        """Return what the blocks return, of the captured `calls`, called on what the stock forward gives them."""
        given = self._find_arguments(args, kwargs, calls)
        values: list[Any] = []
        for number, call in enumerate(calls):
            block_call: Any = call.target
            captured: Given = fx.map_arg((call.args, call.kwargs), _form_of)  # pyright: ignore[reportAssignmentType]
            own_args, own_kwargs = captured if given is None else _as_given(captured, given[number])
            values.append(block_call(*own_args, **own_kwargs))
        return values

    def give(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note what a block is given, and return a form of its value; only while the stock forward runs."""
        assert self._given is not None, "no stock forward runs on meta"
        self._given.append((args, kwargs))
        if len(self._given) == len(self._values):
            raise BlocksDone
        return self._values[len(self._given) - 1]

    def _find_arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], calls: tuple[fx.Node, ...]
    ) -> list[Given] | None:
        """Return what the stock forward gives each block, None where it asks for values that are not known."""
        if any(getattr(call.target, "fxopt_flat", False) for call in calls):
            reason = "captured blocks also return what transformers collects inside them"
        else:
            self._given, self._values = [], [_form_of(call) for call in calls]
            reason = "it calls fewer blocks"
            try:
                with WholeNumbers():
                    self.model.forward(*args, **kwargs)
            except BlocksDone:
                return self._given
            except Exception as error:  # of any code of the user's, which has no values here
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            finally:
                self._given = None
        if any(_is_mask(node) for call in calls for node in call.all_input_nodes):
            self._tell(
                "without values the stock forward does not run to its last block, so blocks are taken to be given the "
                f"masks of the capture, which a step may leave out: {reason}"
            )
        return None


def _as_given(captured: Given, given: Given) -> Given:
    """Return the `captured` arguments with what the stock forward gives: None for some, tensors of other strides."""
    (args, kwargs), (own_args, own_kwargs) = captured, given
    if len(args) != len(own_args) or kwargs.keys() != own_kwargs.keys():
        return captured

    def choose(value: Any, own: Any) -> Any:
        return on_meta(own) if own is None or isinstance(own, torch.Tensor) else value

    chosen = (choose(value, own) for value, own in zip(args, own_args, strict=True))
    return tuple(chosen), {name: choose(value, own_kwargs[name]) for name, value in kwargs.items()}


def _form_of(node: fx.Node) -> Any:
    return on_meta(node.meta["example_value"])


def _is_mask(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool
