"""Sizes as numbers: a symbolic one is what was seen of it at capture, and reading it makes no guard."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fxopt.graph.torch_private import hint_of

UNSEEN = 8
"""What a size is taken for that hangs on the values of a tensor."""


def number_of(size: Any) -> int:
    """Return a size as a number: the one seen at capture where it is symbolic, `UNSEEN` where none was seen."""
    hint = hint_of(size)
    return UNSEEN if hint is None else hint


def num_bytes_of(value: Tensor) -> int:
    """Return the bytes of one tensor's items.

    >>> import torch
    >>> num_bytes_of(torch.ones(2, 3, dtype=torch.bfloat16))
    12
    """
    return math.prod(map(number_of, value.shape)) * value.element_size()
