"""Python's collector of cycles, kept out of captures.

A capture makes some hundred thousand objects, nearly all of which stay, and so sets off collection after collection;
the full ones walk over every object of the process, half a second each once models and compilers are imported.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected(*, needed: bool = True) -> Iterator[None]:
    """Run the body without collections, if `needed`; what is garbage then waits until the next one."""
    if not needed or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
