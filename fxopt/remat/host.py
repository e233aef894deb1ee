"""How much of the host's memory values may wait in."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fxopt.errors import FxoptError
from fxopt.remat.budget import parse_size
from fxopt.report.units import format_bytes

SHARE = 0.5
"""How much of what is free on the host is used where nobody says."""
CGROUP = Path("/sys/fs/cgroup")


def parse_host_memory(text: str) -> int:
    """Return the bytes that the command line allows, on whatever machine.

    >>> parse_host_memory("0"), parse_host_memory("1GiB")
    (0, 1073741824)
    """
    return int(text) if text.isdecimal() else parse_size(text, "--host-memory")


def check_host_memory(value: object) -> int | None:
    """Return the bytes that `max_host_memory` allows, or None: half of what is free when a plan is made.

    Raises:
        FxoptError: no size, or more than is free.

    >>> check_host_memory("1MiB"), check_host_memory(0)
    (1048576, 0)
    """
    if value is None:
        return None
    if isinstance(value, str):
        size = parse_size(value, "max_host_memory")
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        size = value
    else:
        raise FxoptError(
            f'max_host_memory: expected bytes, a size like "32GiB", 0 for none or None, got {value!r}'
        )
    free = free_host_bytes()
    if size > free:
        raise FxoptError(
            f"max_host_memory: expected at most the {format_bytes(free)} that are free, got {format_bytes(size)}\n"
            "leave it out to use half of what is free"
        )
    return size


def free_host_bytes() -> int:
    """Return what this process may still allocate on the host, in bytes: of the machine, and of its container."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with contextlib.suppress(OSError, ValueError):  # "max" where the container has no limit of its own
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(0, limit - used))
    return free
