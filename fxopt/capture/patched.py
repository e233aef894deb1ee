"""Which classes and modules of a model run a forward that another package put into them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from fxopt.capture import torch_modules
from fxopt.capture.modules import walk
from fxopt.capture.places import line_of, with_place

OURS = "fxopt"
WRAPPERS = ("accelerate", "torch")


def find_patched(model: nn.Module) -> tuple[str, ...]:
    """Return one line per class of `model` whose forward is defined in none of the packages of its bases."""
    lines: dict[str, None] = {}
    for kind in {type(module): None for module in walk(model)}:
        forward = inspect.unwrap(torch_modules.forward_of(kind))
        package = _package_of(getattr(forward, "__module__", None))
        if package and package not in _packages_of(kind):
            lines.setdefault(
                with_place(
                    f"{kind.__name__} was patched by {package} before fxopt saw it: "
                    "its forms count as the stock ones, and what they call may not be captured",
                    line_of(forward),
                )
            )
    return tuple(lines)


def find_own_forwards(model: nn.Module) -> tuple[str, ...]:
    """Return one line per module of `model` that another package gave a forward of its own, as trainers do."""
    lines: dict[str, None] = {}
    for module in walk(model):
        function = _find_foreign(module)
        if function is not None:
            lines.setdefault(
                with_place(
                    f"{type(module).__name__}: {_package_of_code(function)} put a forward of its own on this model; "
                    "what that computes after the blocks is left as it is",
                    line_of(function),
                )
            )
    return tuple(lines)


def find_replaced(modules: Iterable[nn.Module]) -> nn.Module | None:
    """Return the first of `modules` whose forward another package has replaced by one of its own, or None."""
    return next((module for module in modules if _find_foreign(module) is not None), None)


def _find_foreign(module: nn.Module) -> Any:
    """Return the function of another package's that was put on `module` as its forward, or None.

    What accelerate and torch put around a forward, autocast for one, leaves as it is what that computes; one that is
    wrapped need not be called by what wraps it.
    """
    function: Any = module.__dict__.get("forward")
    while function is not None:
        function = getattr(function, "__func__", function)
        package = _package_of_code(function)
        if package and package not in (OURS, *WRAPPERS, *_packages_of(type(module))):
            return function
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            # What an object does when it is called is what its class says.
            call = inspect.getattr_static(type(function), "__call__", None)
            function = call if inspect.isfunction(call) else None
    return None


def _package_of_code(function: Any) -> str:
    return _package_of(getattr(function, "__globals__", {}).get("__name__"))


def _packages_of(kind: type) -> set[str]:
    return {_package_of(base.__module__) for base in kind.__mro__}


def _package_of(module: str | None) -> str:
    return (module or "").partition(".")[0]
