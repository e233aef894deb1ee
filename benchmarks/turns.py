"""Processes that share one GPU: all prepare at once, and one at a time measures while the others stand still.

Capturing and compiling take seconds of a processor, a measured step milliseconds of the GPU. So each process says when
it is ready, waits for its turn, and says when it is done; meanwhile the others are stopped, with all they started.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

READY, DONE, GO = "ready", "done", "go"
LONGEST_TURN = 60.0
"""After so many seconds the others go on, whatever the one does whose turn it is."""


class Turn:
    """What a process holds that takes turns with others; alone, it is always its turn."""

    def __init__(self) -> None:
        self._said: TextIO | None = None
        if os.environ.get("FXOPT_TURNS"):
            # What libraries print goes with the errors: stdout is for turns alone.
            self._said = os.fdopen(os.dup(1), "w", buffering=1)
            os.dup2(2, 1)

    def __enter__(self) -> None:
        if self._said is not None:
            self._said.write(READY + "\n")
            sys.stdin.readline()

    def __exit__(self, *_: object) -> None:
        if self._said is not None:
            self._said.write(DONE + "\n")


def run_in_turns(
    commands: Sequence[Sequence[str]],
    logs: Sequence[Path],
    *,
    at_once: int,
    until: float,
    tell: Callable[[str], None],
) -> None:
    """Run `commands`, so many at once, each with what it prints in its log; end all at the time `until`."""
    waiting = deque(zip(commands, logs, strict=True))
    queue: deque[subprocess.Popen[str]] = deque()
    running: list[subprocess.Popen[str]] = []
    active: subprocess.Popen[str] | None = None
    since = 0.0
    with selectors.DefaultSelector() as selector:
        try:
            while (waiting or running) and time.time() < until:
                while waiting and len(running) < at_once:
                    command, log = waiting.popleft()
                    process = _start(command, log)
                    assert process.stdout is not None
                    selector.register(process.stdout.fileno(), selectors.EVENT_READ, process)
                    running.append(process)
                for key, _ in selector.select(timeout=1):
                    process = key.data
                    # A buffered reader would keep a second line to itself.
                    said = os.read(key.fd, 1 << 16).decode()
                    if process is active and (not said or DONE in said):
                        active = None
                        _signal(running, signal.SIGCONT)
                    if READY in said:
                        queue.append(process)
                    if not said:
                        selector.unregister(key.fd)
                        running.remove(process)
                        _signal([process], signal.SIGCONT)  # it may have been stopped on its way out
                        tell(f"process {process.pid} ended with {process.wait()}")
                if active is not None and time.time() - since > LONGEST_TURN:
                    tell(f"process {active.pid} has had its turn for {LONGEST_TURN:.0f} s: the others go on")
                    active = None
                    _signal(running, signal.SIGCONT)
                while active is None and queue:
                    process = queue.popleft()
                    if process not in running:
                        continue
                    _signal([other for other in running if other is not process], signal.SIGSTOP)
                    assert process.stdin is not None
                    active, since = process, time.time()
                    process.stdin.write(GO + "\n")
                    process.stdin.flush()
        finally:
            _signal(running, signal.SIGCONT)
            _signal(running, signal.SIGKILL)
            for process in running:
                process.wait()


def _start(command: Sequence[str], log: Path) -> subprocess.Popen[str]:
    with log.open("w") as errors:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "FXOPT_TURNS": "1"},
            start_new_session=True,
        )


def _signal(processes: Sequence[subprocess.Popen[str]], number: signal.Signals) -> None:
    """Send a signal to processes of `_start`, and to all that these started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, number)
