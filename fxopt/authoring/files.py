"""Patterns read from a Python file of the user's."""

from __future__ import annotations

import sys
from pathlib import Path

from fxopt.errors import FxoptError
from fxopt.rewriting.failures import line_in, said_by
from fxopt.rewriting.pattern import Pattern
from fxopt.rewriting.user_files import module_of_file


def load_patterns(path: Path) -> tuple[Pattern, ...]:
    """Return the patterns that a Python file defines at its top level.

    Raises:
        FxoptError: no such file, it cannot be imported, or it defines none.
    """
    module, run = module_of_file(path, "patterns with fxopt.pattern")
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        run()
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
