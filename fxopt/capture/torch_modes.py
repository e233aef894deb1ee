"""What is private of torch's modes: those under which Dynamo captures nothing, or compiled nodes cannot serve.

`tests/fxopt/capture/test_torch_modes.py` fails in plain words when a torch version moves one of these.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx
from torch.autograd import forward_ad
from torch.utils import _python_dispatch as python_dispatch

from fxopt.capture.places import with_place
from fxopt.graph.torch_private import ENTER_INFERENCE
from fxopt.graph.view import location_of


class ModeRefusal(Exception):
    """A captured graph switches to a mode in which it cannot be compiled for training."""


def check_modes(gm: fx.GraphModule) -> None:
    """Check that a captured graph stays out of inference mode.

    AOTAutograd runs into an assertion of torch's own there as soon as a weight is multiplied, and leaves the thread's
    dispatcher in a state in which nothing runs.

    Raises:
        ModeRefusal: it does not.
    """
    for node in gm.graph.nodes:
        if node.target is ENTER_INFERENCE and node.args[0]:
            text = (
                "torch.inference_mode() within it, which cannot be compiled for training; torch.no_grad() can"
            )
            raise ModeRefusal(with_place(text, location_of(node)))


class Around(NamedTuple):
    """What surrounds a call and changes what it computes or saves."""

    grad: bool
    inference: bool
    autocast: tuple[Any, ...]
    saved_hooks: Any
    function_modes: int
    dispatch_modes: int


def find_around() -> Around:
    """Return what surrounds the code that runs now."""
    torchs: Any = torch._C
    autocast = [torch.is_autocast_cache_enabled()]
    for device in ("cpu", "cuda"):
        autocast += [torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)]
    return Around(
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple(autocast),
        torchs._autograd._top_saved_tensors_default_hooks(True),
        torchs._len_torch_function_stack(),
        torchs._len_torch_dispatch_stack(),
    )


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
