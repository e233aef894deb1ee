"""A scope in which no tensor that was there before is written to: a block runs in it that has to leave no trace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fxopt.capture import torch_stand_ins
from fxopt.capture.places import forward_line, with_place
from fxopt.capture.tail import TailRefusal
from fxopt.graph.storage import UNKNOWN, key_of
from fxopt.graph.torch_private import DispatchMode, schema_of, tree_leaves

KEPT = "a block writes to a tensor that it keeps, beside its buffers"


class WritesWatched(DispatchMode):
    """Refuses each op of `block` that would write to a real tensor which was not made in the scope, before it does.

    `free` may be written to. What is written to is told by its storage, so views count; stand-ins are nobody's.
    """

    def __init__(self, block: nn.Module, free: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._block = block
        self._free = {key_of(tensor) for tensor in free}
        self._held: list[torch.Tensor] = []
        """What was made: a storage that is freed meanwhile may be another's next."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if schema_of(func).is_mutable:
            for tensor in _written(func, args, kwargs):
                if not torch_stand_ins.is_fake(tensor) and key_of(tensor) not in self._free:
                    raise TailRefusal(with_place(KEPT, forward_line(self._block)))
        found = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        given = {key_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for tensor in made:
            if not torch_stand_ins.is_fake(tensor) and key_of(tensor) not in given | {UNKNOWN}:
                self._free.add(key_of(tensor))
                self._held.append(tensor)
        return found


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors among the arguments that `func` writes to by its schema."""
    found: list[torch.Tensor] = []
    for place, argument in enumerate(schema_of(func).arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found
