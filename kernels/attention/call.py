"""The inputs of one attention, as everything below the op takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Call:
    """One attention; the fields stand in the order of the arguments of `fxopt::attention`, see `attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    intervals: Tensor | None
    reads: Tensor | None
    sinks: Tensor | None
    causal: bool
    scale: float
    softcap: float
    safe: bool


NUM_FIELDS = len(dataclasses.fields(Call))


def with_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function(call, *rest)` as an op calls it: the fields of the call one by one, then the rest."""

    def run(*arguments: Any) -> Any:
        return function(Call(*arguments[:NUM_FIELDS]), *arguments[NUM_FIELDS:])

    return run
