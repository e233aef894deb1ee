"""Which memory the value of a node lies in."""

from __future__ import annotations

from torch import Tensor, fx

from fxopt.graph.torch_private import storage_key
from fxopt.graph.view import tensors_of

UNKNOWN = -1
"""The storage of tensors that have none (wrappers, sparse ones): anything may happen to it."""


def key_of(value: Tensor) -> int:
    """Return what identifies the storage of one tensor: views of one tensor have it in common."""
    try:
        return storage_key(value)
    except (NotImplementedError, RuntimeError):
        return UNKNOWN


def keys_of(node: fx.Node) -> frozenset[int]:
    """Return the storages of the tensors in the value of `node`."""
    return frozenset(map(key_of, tensors_of(node)))


def joint_key_of(node: fx.Node) -> int | None:
    """Return the storage of the value of a joint graph's node, or None: it is no tensor."""
    value = node.meta.get("val")
    return key_of(value) if isinstance(value, Tensor) else None
