"""Pieces of a block whose graph breaks: each compiled where that can be done, else run as it was captured."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

from torch import fx

from fxopt.capture import torch_errors
from fxopt.capture.ledger import Ledger
from fxopt.capture.reasons import reason_of_failure

log = logging.getLogger("fxopt")


def or_as_captured(backend: Callable[..., Any], ledger: Ledger, region: str) -> Callable[..., Any]:
    """Return `backend` so that a piece which it cannot compile runs its own nodes, counted as a fallback.

    The pieces before it have run by then, and changed what they change: the block cannot begin again as stock.

    Raises:
        FxoptError, VerifyError: from the backend, for a mistake of the user's or of a pass.
    """

    def compile_piece(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        try:
            return backend(gm, example_inputs)
        except torch_errors.HANDLED_BY_DYNAMO:
            raise
        except Exception as error:
            if torch_errors.cause_to_raise(error) is not None:
                raise
            reason = f"a piece runs as stock: {reason_of_failure(error)}"
        ledger.progress.wipe()
        log.warning("%s: %s", region, reason)

        def run(*args: Any) -> Any:
            ledger.count_stock_piece(region, reason)
            return captured(*args)

        return run

    return compile_piece
