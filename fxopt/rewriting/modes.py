"""The modes that a node runs in: gradient mode and autocast, as the switches in a graph set them.

A graph switches them by nodes of its own; what it leaves alone is as it is around the graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from typing import Any

import torch
from torch import fx

from fxopt.graph.torch_private import ENTER_AUTOCAST, EXIT_AUTOCAST
from fxopt.rewriting.pattern import Match

Autocast = tuple[str, torch.dtype | None, bool]


@dataclasses.dataclass(frozen=True)
class Mode:
    """What the switches before a node have set: gradient mode and autocast regions, outermost first."""

    grad: bool | None = None
    autocast: tuple[Autocast, ...] = ()


def switched(mode: Mode, node: fx.Node) -> Mode:
    """Return the mode after the switch `node` in `mode`."""
    if node.target is ENTER_AUTOCAST:
        device, dtype, enabled, *_ = (*node.args, None, True)
        entered: Any = (device, dtype, enabled)
        return dataclasses.replace(mode, autocast=(*mode.autocast, entered))
    if node.target is EXIT_AUTOCAST:
        return dataclasses.replace(mode, autocast=mode.autocast[:-1])
    return dataclasses.replace(mode, grad=bool(node.args[0]))


def autocast_of(match: Match) -> Autocast:
    """Return the autocast state of the matched nodes: the graph's own switch, else the ambient state."""
    device = match.output.device.type
    if match.autocast is not None:
        return match.autocast
    return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


def uncached_autocast(state: Autocast) -> torch.autocast:
    """Return a scope of an autocast state in which no cast of a weight is kept."""
    device, dtype, enabled = state
    # A cached cast of a weight would belong to the run before.
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


@contextlib.contextmanager
def autocast_scope(autocast: Autocast | None) -> Generator[None]:
    """Run the body under an autocast state that the graph itself switches to; the ambient one for None."""
    if autocast is None:
        yield
        return
    device, dtype, enabled = autocast
    with torch.autocast(device, dtype=dtype, enabled=enabled):
        yield
