"""Functions of tensors as graphs: captured by Dynamo, with everything that is no tensor fixed."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.graph.torch_private import quiet_fakes
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

    parameters = _parameters_of(function)
    if len(parameters) == len(case):
        run.__dict__["__signature__"] = inspect.Signature([parameters[place] for place in places])
    return run, tensors


def _parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of `function`, none where it is written in C and has no signature."""
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:
        return []


class _Captured(Exception):
    """Carries what the captured graph was called with."""


def capture(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], dynamic: bool | None = False
) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """Return the one graph that `function` is captured as, and the value that each of its placeholders has.

    With `dynamic` None those sizes are symbols that were marked so.

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
    compiled = untyped.compile(own, backend=remember, fullgraph=True, dynamic=dynamic)
    try:
        with quiet_fakes():
            compiled(*inputs)
    except _Captured as reached:
        values = reached.args[0]
        _name_inputs(graphs[-1], function, {id(value): place for place, value in enumerate(inputs)}, values)
        return graphs[-1], values
    raise RuntimeError("it computes nothing from its tensors")


def _name_inputs(
    gm: fx.GraphModule, function: Callable[..., Any], place_of: dict[int, int], values: Sequence[Any]
) -> None:
    """Call the placeholders as `function` calls its arguments, where that name is free."""
    names = [parameter.name for parameter in _parameters_of(function)]
    taken = {node.name for node in gm.graph.nodes}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), values, strict=True):
        place = place_of.get(id(value), len(names))
        if place < len(names) and names[place] not in taken:
            node.name = names[place]
    gm.recompile()
