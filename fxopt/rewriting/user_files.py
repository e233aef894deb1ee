"""Python files of the user's, run as modules of their own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fxopt.errors import FxoptError


def module_of_file(path: Path, gives: str) -> tuple[ModuleType, Callable[[], None]]:
    """Return an empty module for the Python file `path`, and what runs the file in it.

    It is found in `sys.modules`, where Dynamo looks for the globals of functions, under the file's name, or beside the
    module of that name which is there already.

    Raises:
        FxoptError: no such file, or no Python file; `gives` is what one that is meant defines.
    """
    if not path.is_file():
        raise FxoptError(f"{path}: no such Python file\ngive a file that defines {gives}")
    known: Any = sys.modules.get(path.stem)
    is_taken = known is not None and Path(getattr(known, "__file__", None) or "") != path.resolve()
    name = f"{path.stem}_of_{path.resolve().parent.name}" if is_taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        got = f"one that ends in {path.suffix}" if path.suffix else "one without an ending"
        raise FxoptError(f"{path}: not a Python file, expected a name that ends in .py, got {got}\nrename it")
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[name] = module
    return module, lambda: loader.exec_module(module)
