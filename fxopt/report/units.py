"""Numbers with units, as every text that fxopt prints has them."""

from __future__ import annotations


def format_bytes(number: float) -> str:
    """Return a number of bytes in the unit in which it reads best.

    >>> format_bytes(512), format_bytes(3 * 2**20), format_bytes(12.5 * 2**30)
    ('512 B', '3.0 MiB', '12.50 GiB')
    """
    for unit, size, digits in (("TiB", 2**40, 2), ("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if abs(number) >= size:
            return f"{number / size:.{digits}f} {unit}"
    return f"{number:.0f} B"


def plural(number: int, noun: str) -> str:
    """Return a number of things.

    >>> plural(1, "rewrite"), plural(3, "rewrite")
    ('1 rewrite', '3 rewrites')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"
