"""A model on devices of several types: torch's own error says which op met two, and not which weight lies where."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fxopt.capture import zero
from fxopt.capture.torch_distributed import is_dtensor


@contextlib.contextmanager
def mixture_told(model: nn.Module) -> Iterator[None]:
    """Add to torch's error about devices which tensors of `model` lie on another type of device than the most.

    A model may move values between devices itself, so a mixture is no error before an op fails.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        is_about_devices = "device" in said and not isinstance(error, torch.OutOfMemoryError)
        text = find_mixture(model, with_meta="meta" in said) if is_about_devices else None
        if text is not None and text not in getattr(error, "__notes__", ()):
            error.add_note(text)
        raise


def find_mixture(model: nn.Module, *, with_meta: bool = True) -> str | None:
    """Return which tensors of `model` lie on another type of device than the most do, or None: all are on one.

    What an engine spreads over ranks is left out: it may wait on the host. So is, but `with_meta`, what has no values
    here: a library fetches them.
    """
    by_type: dict[str, list[str]] = {}
    named: tuple[tuple[str, torch.Tensor], ...] = (*model.named_parameters(), *model.named_buffers())
    for name, tensor in named:
        is_here = with_meta or not tensor.is_meta
        if is_here and not is_dtensor(tensor) and not zero.is_partitioned(tensor):
            by_type.setdefault(tensor.device.type, []).append(name)
    if len(by_type) < 2:
        return None
    most = max(by_type, key=lambda device: len(by_type[device]))
    others = ", ".join(
        f"{len(names)} on {device} ({', '.join(names[:3])})"
        for device, names in by_type.items()
        if device != most
    )
    return (
        f"fxopt: the model's tensors are on {len(by_type)} types of devices, expected one, got {len(by_type[most])} on "
        f"{most} and {others}\nfxopt: move the model as a whole: model.to({most!r})"
    )
