"""Which classes of a model run a forward that another package put into them."""

from __future__ import annotations

import inspect

from torch import nn

from fxopt.capture.modules import walk


def find_patched(model: nn.Module) -> tuple[str, ...]:
    """Return one line per class of `model` whose forward is defined in none of the packages of its bases."""
    lines: dict[str, None] = {}
    for kind in {type(module): None for module in walk(model)}:
        forward = inspect.unwrap(kind.forward)
        package = _package_of(getattr(forward, "__module__", None))
        if package and package not in {_package_of(base.__module__) for base in kind.__mro__}:
            lines.setdefault(
                f"{kind.__name__} was patched by {package} before fxopt saw it: "
                "its forms count as the stock ones, and what they call may not be captured"
            )
    return tuple(lines)


def _package_of(module: str | None) -> str:
    return (module or "").partition(".")[0]
