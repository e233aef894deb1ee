"""Python's table of handlers is read as Python itself reads it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import pytest

from fxopt.capture.guarded import is_guarded


def look() -> bool:
    frame = sys._getframe(1)
    return is_guarded(frame.f_code, frame.f_lasti)


def plainly() -> bool:
    return look()


def after_others() -> bool:
    with contextlib.suppress(ValueError):
        pass
    for _ in range(300):
        pass
    return look()


def in_a_try() -> bool:
    try:
        return look()
    except ValueError:
        return False


def in_a_finally() -> bool:
    try:
        found = look()
    finally:
        pass
    return found


def in_a_with() -> bool:
    with contextlib.nullcontext():
        return look()


@pytest.mark.parametrize(
    ("function", "guarded"),
    [(plainly, False), (after_others, False), (in_a_try, True), (in_a_finally, True), (in_a_with, True)],
)
def test_a_call_inside_a_handlers_range_is_told(function: Callable[[], bool], guarded: bool) -> None:
    assert function() is guarded
