"""The file of timings: JSON, written whole or not at all; one that cannot be read is as good as none."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("fxopt")
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one call takes on the device."""

    ms: float


def read_timings(path: Path) -> dict[str, Timing]:
    """Return the timings in the file at `path`, none where it is missing or broken."""
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        if data["format"] != FORMAT:
            return {}
        return {str(key): Timing(float(item["ms"])) for key, item in data["timings"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: ignored, expected timings of ops, got %s: %s", path, type(error).__name__, error)
        return {}


def write_timings(path: Path, timings: Mapping[str, Timing]) -> None:
    """Add `timings` to the file at `path`; where that cannot be written, a later process times them again."""
    found = {**read_timings(path), **timings}
    data = {"format": FORMAT, "timings": {key: dataclasses.asdict(found[key]) for key in sorted(found)}}
    written = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            written = file.name
            file.write(json.dumps(data, indent=1))
        os.replace(written, path)
    except OSError as error:
        log.debug("%s cannot be written: %s", path, error)
        if written is not None:
            Path(written).unlink(missing_ok=True)
