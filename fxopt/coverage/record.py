"""What is kept of one case, and of the machine's versions: plain values, as they stand in the JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from typing import Any

STATUSES = (
    "captured",
    "blocks captured",
    "partly captured",
    "stock",
    "wrong",
    "failed",
    "not built",
    "timed out",
    "out of memory",
)
"""`captured`: every call was served. `blocks captured`: every distinct block was, what stands around them runs stock.
`partly captured`: some blocks were. `stock`: nothing was. `wrong`: a loss or gradient differs. `failed`: fxopt raised
where stock did not. `not built`: no tiny model that trains as stock. The last two are ended by the runner, or by the
memory limit it sets."""


@dataclasses.dataclass
class Row:
    """What one case gave.

    `sites`: per pattern how many were found, rewritten, refused, unmatched. `seconds`: of processor time.
    `stock_error`: how far stock's own `worst_gradient` is off a float64 run, where one was made.
    `forms`: the ops that came in, with the attributes that tell normal forms apart (of numbers, 0 and 1 only).
    """

    case: str
    model_type: str
    task: str
    status: str
    reason: str = ""
    model: str = ""
    parameters: int = 0
    regions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sites: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    left: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    forms: list[str] = dataclasses.field(default_factory=list)
    fallbacks: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    loss_error: float | None = None
    gradient_error: float | None = None
    worst_gradient: str = ""
    stock_error: float | None = None
    saved_bytes_stock: int | None = None
    saved_bytes: int | None = None
    captures: int = 0
    seconds: float = 0.0


def versions() -> dict[str, str]:
    """Return the versions the rows depend on."""
    names = ("fxopt", "transformers", "torch")
    return {"python": platform.python_version(), **{name: _version_of(name) for name in names}}


def _version_of(name: str) -> str:
    if name == "fxopt":
        import fxopt

        return fxopt.__version__
    return importlib.metadata.version(name)
