"""Notes beside Triton's compiled kernels: of which graphs a process has had all kernels compiled.

They lie in Triton's own cache, so who removes the kernels removes the notes with them. A note that is wrong costs
time and nothing else: kernels that are not there are compiled when they are launched.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fxopt.capture.caching import source_digest
from fxopt.capture.lowering import find_gpu
from fxopt.kernels import launch

NOTE = "compiled.txt"
log = logging.getLogger("fxopt")


def name_compiled(gm: fx.GraphModule, used: Iterable[str]) -> str:
    """Return what tells `gm` and its kernels from any other, where patterns called `used` are tried; "" without a GPU.

    It is the same in each process, and another one as soon as anything of fxopt is edited.
    """
    device = find_gpu(gm)
    if device is None or not launch.is_available():
        return ""
    inputs = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    forms = [
        (tuple(map(str, value.shape)), str(value.dtype), value.requires_grad)
        for value in inputs
        if isinstance(value, torch.Tensor)
    ]
    compiler = (source_digest(), torch.__version__, torch.cuda.get_device_name(device))
    return hashlib.sha256(repr((compiler, tuple(used), forms, str(gm.graph))).encode()).hexdigest()


def are_compiled(name: str) -> bool:
    """Return whether `note_compiled` was called with `name` of `name_compiled`, here or in an earlier process."""
    try:
        return _folder_of(name).get_file(NOTE) is not None
    except OSError as error:
        log.debug("Triton's cache cannot be read: %s", error)
        return False


def note_compiled(name: str) -> None:
    """Note that all kernels that belong to `name` are in Triton's cache."""
    try:
        _folder_of(name).put(name, NOTE, binary=False)
    except OSError as error:
        log.debug("Triton's cache cannot be written: %s", error)


def _folder_of(name: str) -> Any:
    from triton.runtime.cache import get_cache_manager

    return get_cache_manager(name)
