"""A callback for transformers' `Trainer`, and all trainers made of it, that logs what fxopt does while it trains."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from transformers import TrainerCallback as Base

from fxopt.capture.installation import find_installation

log = logging.getLogger("fxopt")
GIB = 2**30


class TrainerCallback(Base):
    """Adds to each log of a trainer the peak of memory, the calls that ran stock, and the recompiles.

    `fxopt_peak_gib`: the most memory allocated on the model's device so far, on a CPU the most the process held.
    `fxopt_fallbacks`: calls that ran the stock path although fxopt would have served them. `fxopt_recompiles`:
    captures beyond the first of each region. A new reason for a fallback is logged as a warning once.

    Give it first of the callbacks, so that others find the values in the logs: `callbacks=[fxopt.TrainerCallback()]`.

    >>> import fxopt
    >>> isinstance(fxopt.TrainerCallback(), __import__("transformers").TrainerCallback)
    True
    """

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Say so where the model is not optimized: there is nothing to log."""
        if model is not None and find_installation(model) is None:
            log.warning("%s is not optimized: fxopt.TrainerCallback logs nothing of it", type(model).__name__)

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any
    ) -> None:
        """Put the values into `logs`, and into the trainer's history."""
        installation = None if model is None else find_installation(model)
        if model is None or installation is None or logs is None:
            return
        ledger = installation.ledger
        values = {
            "fxopt_peak_gib": round(peak_bytes(model) / GIB, 3),
            "fxopt_fallbacks": sum(ledger.fallbacks.values()),
            "fxopt_recompiles": ledger.num_recompiles,
        }
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)
        for (region, reason), count in ledger.fallbacks.items():
            if (region, reason) not in self._told:
                self._told.add((region, reason))
                log.warning("%s: %d calls ran stock so far: %s", region, count, reason)


def peak_bytes(model: torch.nn.Module) -> int:
    """Return the most bytes that were allocated on the model's device, or that the process held on a CPU."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, where no GPU build is supported either

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
