"""The frame in which Dynamo captures a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def model_entry(model: nn.Module, count_eager: Callable[[], None], args: Any, kwargs: Any) -> Any:
    """Run `model`'s forward; Dynamo captures this frame, and what runs it uncaptured is counted."""
    if not torch.compiler.is_compiling():
        count_eager()
    # Read so that Dynamo guards it: a capture for training returns lazy logits and must not serve evaluation.
    bool(model.training)
    return model.forward(*args, **kwargs)
