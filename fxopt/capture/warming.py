"""What compiling needs for the first time in a process, loaded while the user's own set-up runs.

Inductor's modules, its pool of compiling processes and Triton's driver take about three seconds, which would
otherwise come out of the first training step.
"""

from __future__ import annotations

import functools
import logging
import threading

import torch

from fxopt.capture import torch_lowering
from fxopt.kernels import launch, launcher

log = logging.getLogger("fxopt")


def start_warming(device: torch.device) -> None:
    """Start loading what Inductor and Triton need on `device`, once per process, in the background."""
    if device.type == "cuda" and launch.is_available():
        torch_lowering.share_kernel_cache(device)
        _start()


@functools.cache
def _start() -> None:
    threading.Thread(target=_warm, name="fxopt-warming", daemon=True).start()


def _warm() -> None:
    try:
        launcher.read_triton()
        torch_lowering.load_inductor()
    except Exception as error:  # the first step will meet it again, and raise it where it can be seen
        log.debug("warming up the compiler failed: %s: %s", type(error).__name__, error)
