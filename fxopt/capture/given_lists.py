"""Lists that a model gives to its blocks: a block that writes to one cannot be stood in for under capture."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxopt.capture.places import forward_line, with_place
from fxopt.capture.tail import TailRefusal


class GivenLists:
    """The lists in a block's arguments, with what they held before it ran."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pairs = [(found, list(found)) for found in _lists_in((args, kwargs))]

    def check(self, block: nn.Module) -> None:
        """Check that `block` left them as they were: what the model reads there would be stand-ins.

        Raises:
            TailRefusal: it did not.
        """
        for now, before in self._pairs:
            if len(now) == len(before) and all(item is was for item, was in zip(now, before, strict=True)):
                continue
            verb = "appends to" if len(now) > len(before) else "changes"
            reason = f"a block {verb} a list that it is given, which the model may read after the blocks"
            raise TailRefusal(with_place(reason, forward_line(block)))


def writable(value: Any) -> Any:
    """Return `value` with lists and mappings of its own, as a block expects them: those of a graph refuse writes."""
    if isinstance(value, dict):
        return {name: writable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [writable(item) for item in value]
    return tuple(map(writable, value)) if type(value) is tuple else value


def _lists_in(value: Any) -> list[list[Any]]:
    if not isinstance(value, dict | list | tuple):
        return []
    items = value.values() if isinstance(value, dict) else value
    inner = [found for item in items for found in _lists_in(item)]
    return [value, *inner] if isinstance(value, list) else inner
