"""`fxopt.restore`: an optimized model made stock again."""

from __future__ import annotations

import logging

from torch import nn

from fxopt.capture.installation import check_model, find_installation
from fxopt.errors import FxoptError

log = logging.getLogger("fxopt")


def restore(model: nn.Module) -> nn.Module:
    """Give back the stock behaviour of an optimized model, bit for bit, and return the same object.

    What others compiled since (`block.compile()`) stays. Where `model` holds an optimized model, or was a part of
    one (adapters put around it, or merged), that one is restored.

    Raises:
        FxoptError: nothing in `model` is optimized.

    >>> import torch, fxopt
    >>> model = fxopt.optimize(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)))
    >>> fxopt.restore(model) is model
    True
    """
    installation = find_installation(check_model(model))
    if installation is None:
        raise FxoptError(
            f"model: {type(model).__name__} is not optimized, expected a model that fxopt.optimize was given\n"
            "a copy or a reloaded model is a stock model already"
        )
    while installation is not None:
        for path in installation.find_replaced():
            log.warning("%s: compiled by module.compile() since fxopt.optimize, left so", path or "the model")
        installation.remove()
        installation = find_installation(model)
    return model
