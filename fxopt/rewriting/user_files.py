"""Python files of the user's, run as modules of their own."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fxopt.errors import FxoptError


def module_of_file(path: Path, gives: str) -> tuple[ModuleType, Callable[[], None]]:
    """Return an empty module for the Python file `path`, and what runs the file in it.

    It is found in `sys.modules`, where Dynamo looks for the globals of functions, under the file's name, or another
    where a module of that name is there already, or would be found by an import.

    Raises:
        FxoptError: no such file, or no Python file; `gives` is what one that is meant defines.
    """
    if not path.is_file():
        raise FxoptError(f"{path}: no such Python file\ngive a file that defines {gives}")
    name = _find_name(path.resolve())
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        got = f"one that ends in {path.suffix}" if path.suffix else "one without an ending"
        raise FxoptError(f"{path}: not a Python file, expected a name that ends in .py, got {got}\nrename it")
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[name] = module
    return module, lambda: loader.exec_module(module)


def _find_name(path: Path) -> str:
    """Return a name for the module of the file at `path` that is no other module's."""
    if not _is_others(path.stem, path) and not _is_importable(path.stem, path):
        return path.stem
    names = (f"{path.stem}_of_{path.parent.name}{number or ''}" for number in itertools.count())
    return next(name for name in names if not _is_others(name, path))


def _is_others(name: str, path: Path) -> bool:
    known: Any = sys.modules.get(name)
    return known is not None and Path(getattr(known, "__file__", None) or "") != path


def _is_importable(name: str, path: Path) -> bool:
    """Return whether importing `name` would find another module than the file at `path`."""
    if name in sys.modules:
        return False
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and Path(spec.origin or "").resolve() != path
