"""Notes beside Triton's compiled kernels: by what name a process has had all that it needed compiled.

They lie in Triton's own cache, so who removes the kernels removes the notes with them. A note that is wrong costs
time and nothing else: kernels that are not there are compiled when they are launched.
"""

from __future__ import annotations

import logging
from typing import Any

NOTE = "compiled.txt"
log = logging.getLogger("fxopt")


def are_compiled(name: str) -> bool:
    """Return whether `note_compiled` was called with `name`, hexadecimal digits, here or in an earlier process."""
    try:
        return _folder_of(name).get_file(NOTE) is not None
    except OSError as error:
        log.debug("Triton's cache cannot be read: %s", error)
        return False


def note_compiled(name: str) -> None:
    """Note that all kernels that belong to `name` are in Triton's cache."""
    try:
        _folder_of(name).put(name, NOTE, binary=False)
    except OSError as error:
        log.debug("Triton's cache cannot be written: %s", error)


def _folder_of(name: str) -> Any:
    from triton.runtime.cache import get_cache_manager

    return get_cache_manager(name)
