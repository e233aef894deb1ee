"""What configs of single types ask beyond the sizes all share: test data, read by nothing but the shrinking."""

from __future__ import annotations

from typing import Any

OVERRIDES: dict[str, dict[str, Any]] = {}
