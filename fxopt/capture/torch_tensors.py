"""What is private of tensors and autograd: counts of writes, subclasses, hooks on what is saved.

`tests/fxopt/capture/test_torch_tensors.py` fails in plain words when a torch version moves one of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

without_torch_function = torch._C.DisableTorchFunctionSubclass
"""A scope in which functions of torch do not go through the `__torch_function__` of a subclass."""

with_torch_function = torch._C._EnableTorchFunction
"""A scope within that one in which they do again."""


def make_form(tensor_class: type[torch.Tensor], form: torch.Tensor, device: torch.device) -> Any:
    """Return a `tensor_class` without values, of shape, strides and dtype of `form`, said to be on `device`."""
    return torch.Tensor._make_wrapper_subclass(
        tensor_class, form.shape, strides=form.stride(), dtype=form.dtype, device=device
    )


def is_in_backward() -> bool:
    """Return whether this thread runs a backward pass."""
    return torch._C._current_graph_task_id() != -1


def version_of(tensor: torch.Tensor) -> int:
    """Return how often `tensor` was written to."""
    return tensor._version


def is_compiled_node(node: object) -> bool:
    """Return whether `node` is the autograd node of one call of a graph that AOTAutograd compiled."""
    return type(node).__name__ == "CompiledFunctionBackward"


def can_hook_saved_tensors() -> bool:
    """Return whether hooks on saved tensors may be set now, and gradients are recorded."""
    autograd: Any = getattr(torch._C, "_autograd")  # noqa: B009
    return torch.is_grad_enabled() and autograd._saved_tensors_hooks_is_enabled()


def top_saved_tensors_hooks() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Return the hooks on saved tensors that are in force, or None; those set within take their place."""
    autograd: Any = getattr(torch._C, "_autograd")  # noqa: B009
    return autograd._top_saved_tensors_default_hooks(True)


def hooks_left_out() -> contextlib.AbstractContextManager[Any]:
    """Return a scope in which what is saved for backward stays as it is, whatever hooks stand around it.

    A non-reentrant checkpoint counts what its function saves, and saves it anew in backward.
    """
    if top_saved_tensors_hooks() is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


def packs_saved_tensors() -> bool:
    """Return whether what autograd saves right now goes to hooks: checkpointed, or kept elsewhere."""
    return top_saved_tensors_hooks() is not None


copy_each: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
"""Copies each tensor of the second list into that of the first, in few launches."""


def allocated_bytes(device: torch.device) -> int:
    """Return what tensors take on `device`; 0 on a CPU, where nobody counts."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def gradient_hooks(tensor: torch.Tensor) -> list[Callable[..., Any]]:
    """Return what was registered to run when the gradient of `tensor` is there."""
    hooks: dict[int, Callable[..., Any]] | None = getattr(tensor, "_post_accumulate_grad_hooks", None)
    return list(hooks.values()) if hooks else []
