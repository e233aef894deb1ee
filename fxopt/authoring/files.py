"""Patterns read from a Python file of the user's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from fxopt.errors import FxoptError
from fxopt.rewriting.failures import line_in, said_by
from fxopt.rewriting.pattern import Pattern


def load_patterns(path: Path) -> tuple[Pattern, ...]:
    """Return the patterns that a Python file defines at its top level.

    Raises:
        FxoptError: no such file, it cannot be imported, or it defines none.
    """
    if not path.is_file():
        raise FxoptError(f"{path}: no such Python file\ngive a file that defines patterns with fxopt.pattern")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FxoptError(f"{path}: not a Python file, expected one whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except FxoptError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise FxoptError(
            f"{path}{line_in(path, error)}: cannot be imported: {said_by(error)}\n"
            f"mend the file; python {path} shows more"
        ) from error
    finally:
        sys.path.remove(folder)
    found = {id(value): value for value in vars(module).values() if isinstance(value, Pattern)}
    if not found:
        raise FxoptError(
            f"{path}: defines no pattern, expected at least one at its top level\n"
            "write MINE = fxopt.pattern(search, replacement, examples=[...])"
        )
    return tuple(found.values())
