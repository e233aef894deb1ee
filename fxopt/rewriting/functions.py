"""Functions of tensors as graphs: captured by Dynamo, with everything that is no tensor fixed."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.rewriting.pattern import Example


def bind_numbers(function: Callable[..., Any], case: Sequence[Any], device: torch.device) -> Example:
    """Return `function` as one of tensors alone, and these on `device`; floats need a gradient."""
    places = [place for place, value in enumerate(case) if isinstance(value, torch.Tensor)]
    tensors = tuple(
        case[place].detach().to(device).requires_grad_(case[place].is_floating_point()) for place in places
    )

    @functools.wraps(function)
    def run(*given: torch.Tensor) -> Any:
        values = list(case)
        for place, value in zip(places, given, strict=True):
            values[place] = value
        return function(*values)

    return run, tensors


class _Captured(Exception):
    """Carries what the captured graph was called with."""


def capture(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor]
) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """Return the one graph that `function` is captured as, and the value that each of its placeholders has.

    Raises:
        Exception: Dynamo's, where there is no such graph.
    """
    graphs: list[fx.GraphModule] = []

    def remember(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)

        def leave(*args: Any) -> Any:
            raise _Captured(args)

        return leave

    def entry(*given: torch.Tensor) -> Any:
        return function(*given)

    # A code object of its own: Dynamo's limits count by code.
    own = types.FunctionType(entry.__code__.replace(), entry.__globals__, "entry", None, entry.__closure__)
    untyped: Any = torch
    compiled = untyped.compile(own, backend=remember, fullgraph=True, dynamic=False)
    try:
        compiled(*inputs)
    except _Captured as reached:
        return graphs[-1], reached.args[0]
    raise RuntimeError("it computes nothing from its tensors")
