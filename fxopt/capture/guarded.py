"""Whether code stands inside a `try` or `with` statement, as Python's table of handlers has it."""

from __future__ import annotations

import functools
import types


@functools.lru_cache(maxsize=256)
def _ranges_of(code: types.CodeType) -> tuple[tuple[int, int], ...]:
    """Return where the instructions of `code` have a handler: first byte, and the one behind the last.

    The table's items are numbers of six bits a byte, the first byte of each item marked: start, length, target and
    depth, the first two in instructions of two bytes (Python's `Objects/exception_handling_notes.txt`).
    """
    items: list[list[int]] = []
    value = 0
    for byte in code.co_exceptiontable:
        if byte & 0x80:
            items.append([])
        value = value << 6 | byte & 0x3F
        if not byte & 0x40:
            items[-1].append(value)
            value = 0
    return tuple((2 * start, 2 * (start + length)) for start, length, *_ in items)


def is_guarded(code: types.CodeType, at: int) -> bool:
    """Return whether an exception raised at the byte `at` of `code` is seen by a handler there."""
    return any(start <= at < stop for start, stop in _ranges_of(code))
