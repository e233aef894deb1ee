"""What is private of torch's modes: those under which Dynamo captures nothing, or compiled nodes cannot serve.

`tests/fxopt/capture/test_torch_modes.py` fails in plain words when a torch version moves one of these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _python_dispatch as python_dispatch


def find_mode() -> str | None:
    """Return under which mode calls run right now that keeps them from being captured, or None.

    Dynamo passes over every frame while a dispatch mode sees each op, and captures no frame that functorch's
    transforms run; compiled nodes have no forward-mode derivative.
    """
    if python_dispatch.is_in_any_mode_without_ignore_compile_internals():
        return "a TorchDispatchMode sees each op"
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009
    if functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func runs the call"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are computed (torch.autograd.forward_ad)"
    return None
