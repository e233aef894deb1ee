"""What a user may ask for as a memory budget, and how many bytes it comes to on a device."""

from __future__ import annotations

import re
import reprlib

from fxopt.errors import FxoptError

DECIMAL = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS = {**DECIMAL, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
NAMED = ("auto", "min")
SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)")

Budget = int | float | str | None


def check_budget(value: object) -> Budget:
    """Return `value` if it is a budget: bytes, a size like "12GiB", a share of the device, "min", "auto" or None.

    Raises:
        FxoptError: it is none of these.

    >>> check_budget("12GiB"), check_budget(0.5), check_budget("min")
    (12884901888, 0.5, 'min')
    """
    if value is None or value in NAMED:
        return value  # pyright: ignore[reportReturnType]
    if isinstance(value, str):
        return parse_size(value)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, float) and 0 < value <= 1:
        return value
    raise _refusal(reprlib.repr(value))  # inputs given in its place may be long


def parse_size(text: str, subject: str = "memory_budget") -> int:
    """Return the bytes of a size like "12GiB", given for the option `subject`.

    Raises:
        FxoptError: it is none.
    """
    found = SIZE.fullmatch(text.strip())
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) == 0:
        if subject != "memory_budget":
            raise FxoptError(f'{subject}: expected bytes or a size like "12GiB", got {text!r}')
        raise _refusal(repr(text))
    return int(float(found[1]) * unit)


def _refusal(got: str) -> FxoptError:
    return FxoptError(
        'memory_budget: expected bytes, a size like "12GiB", a share of the device between 0 and 1, "min", "auto" or '
        f"None, got {got}\nuse one of the units {', '.join(UNITS)}, with a capital letter or without"
    )
