"""Forms of the backward ops that leave their results in their arguments, for where nobody reads these afterwards.

Beside dy, gate and up, `glu_backward_output` takes three more of their size; over all of them it takes none. gate and
up are often saved tensors, which have to stay; dy hardly ever is, and takes one of the results.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxopt.kernels.glu.form import new_gradients, new_output
from fxopt.kernels.glu.launches import launch_backward
from fxopt.kernels.glu.reference import plain_backward, plain_forward
from fxopt.kernels.launch import InPlace, can_launch, register_op

ARGUMENTS = ("dy", "gate", "up")


def register_in_place(op: str, attributes: str) -> tuple[InPlace, ...]:
    """Register the forms of `glu_backward` or `glu_backward_output`, and return them, the most frugal first."""
    with_value = op.endswith("_output")
    over_all = {0: "gate", 1: "up", 2: "dy"} if with_value else {0: "gate", 1: "up"}
    over_dy = {2: "dy"} if with_value else {1: "dy"}
    return tuple(
        _register(f"{op}_over_{name}", attributes, results, 3 if with_value else 2)
        for name, results in (("all", over_all), ("dy", over_dy))
    )


def _register(name: str, attributes: str, results: dict[int, str], num_results: int) -> InPlace:
    written = list(results.values())

    def declare(argument: str) -> str:
        alias = f"({'abc'[written.index(argument)]}!)" if argument in written else ""
        return f"Tensor{alias}{'?' if argument == 'up' else ''} {argument}"

    def fused(dy: Tensor, gate: Tensor, up: Tensor | None, *given: Any) -> Any:
        memory = _places(results, dy, gate, up)
        if not can_launch(dy, gate, up) or not all(
            place is None or place.is_contiguous() for place in memory
        ):
            return plain(dy, gate, up, *given)
        y = memory[2]
        if y is None and num_results == 3:
            y = new_output(gate, up)
        found = launch_backward(dy, gate, up, *given, y=y, memory=(memory[0], memory[1]))
        return _returned([*found, y][:num_results], results)

    def plain(dy: Tensor, gate: Tensor, up: Tensor | None, *given: Any) -> Any:
        found: list[Tensor | None] = [*plain_backward(dy, gate, up, *given)]
        if num_results == 3:
            found.append(plain_forward(gate, up, *given[:-2]))
        for place, value in zip(_places(results, dy, gate, up), found, strict=False):
            if place is not None and value is not None:
                place.copy_(value)
        return _returned(found, results)

    def fake(dy: Tensor, gate: Tensor, up: Tensor | None, *given: Any) -> Any:
        found = [*new_gradients(dy, gate, up, *given), new_output(gate, up)]
        return _returned(found[:num_results], results)

    count = num_results - len(results)
    returns = "()" if not count else "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
    schema = f"{name}({', '.join(map(declare, ARGUMENTS))}, {attributes}, bool need_gate, bool need_up) -> {returns}"
    return InPlace(register_op(schema, plain=plain, fused=fused, fake=fake), results)


def _places(results: dict[int, str], dy: Tensor, gate: Tensor, up: Tensor | None) -> list[Tensor | None]:
    """Return the argument in which each of three results is left, None for others."""
    given: dict[str, Tensor | None] = dict(zip(ARGUMENTS, (dy, gate, up), strict=True))
    return [given[results[number]] if number in results else None for number in range(3)]


def _returned(found: list[Tensor | None], results: dict[int, str]) -> Any:
    """Return the results that no argument holds: None, one, or several."""
    left = [value for number, value in enumerate(found) if number not in results]
    return None if not left else left[0] if len(left) == 1 else tuple(left)
