"""One line that says what is being compiled: which region, what stage, and how long it has taken so far.

A first training step compiles for seconds, and says nothing else meanwhile. On a terminal the line is written over
and wiped at the end; elsewhere each stage is one record at level INFO of the logger "fxopt".
"""

from __future__ import annotations

import logging
import shutil
import sys
import time

log = logging.getLogger("fxopt")


class Progress:
    """The line of one optimized model; its time counts from the first stage after the line was wiped."""

    def __init__(self) -> None:
        self._start = 0.0
        self._shown = False

    def show(self, region: str, stage: str) -> None:
        """Show that `region` is at `stage`."""
        if not self._shown:
            self._start = time.perf_counter()
        self._shown = True
        text = f"fxopt: {region}: {stage}, {time.perf_counter() - self._start:.1f} s"
        if not sys.stderr.isatty():
            log.info("%s", text)
            return
        width = max(shutil.get_terminal_size().columns - 1, 20)
        sys.stderr.write(f"\r\x1b[2K{text if len(text) <= width else text[: width - 3] + '...'}")
        sys.stderr.flush()

    def done(self, region: str) -> None:
        """Record that `region` is compiled, and wipe the line."""
        log.info("fxopt: %s: compiled, %.1f s", region, time.perf_counter() - self._start)
        self.wipe()

    def wipe(self) -> None:
        """Wipe the line, if there is one."""
        if self._shown and sys.stderr.isatty():
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
        self._shown = False
