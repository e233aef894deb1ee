"""Typed reads of what Dynamo left on a node: shape, dtype, device, gradient, source line, module."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

__all__ = [
    "device_of",
    "dtype_of",
    "find_subgraphs",
    "is_of_standard_library",
    "is_tensor",
    "location_in",
    "location_of",
    "module_of",
    "modules_of",
    "requires_grad",
    "results_of",
    "shape_of",
    "tensors_of",
    "value_of",
]

Dim = int | torch.SymInt
TORCH_FOLDER = os.path.dirname(str(torch.__file__)) + os.sep
FXOPT_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
LIBRARY_FOLDER = sysconfig.get_path("stdlib") + os.sep
PACKAGES_FOLDERS = tuple(LIBRARY_FOLDER + name + os.sep for name in ("site-packages", "dist-packages"))
MODULES_FOLDER = os.path.join(TORCH_FOLDER, "nn", "modules") + os.sep
CALLING = os.sep + "module.py"
FRAME = re.compile(r'File "([^"]+)", line (\d+)')
GIVEN = "L['args'][0]"
"""What torch 2.14 calls a compiled module in its own frame, where others call it `L['self']`."""
CHILDREN = re.compile(r"""(\.__dict__\[['"]_modules['"]\]|\._modules\b)""")
"""How Dynamo reaches a module in another: in two ways, the first where that one has a `__getattr__` of its own."""
OWNER = re.compile(r"\.\w+\.__self__\b")
"""How Dynamo reaches a module that it first met as the owner of a bound method: by that method, from itself."""
SUBSCRIPT = re.compile(r"""\[['"]?([^'"\]]+)['"]?\]""")

INLINED = frozenset(
    {
        "tag_activation_checkpoint",
        "wrap",
        "wrap_activation_checkpoint",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
        "invoke_subgraph",
    }
)
"""Higher-order ops that run their body as it stands, on the tensors they are given."""


def value_of(node: fx.Node) -> Any:
    """Return the example value of `node`: a fake tensor, a tuple of them, a SymInt, or None."""
    return node.meta.get("example_value")


def is_tensor(node: Any) -> bool:
    """Return whether `node` is a node whose value is one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("example_value"), Tensor)


def tensors_of(node: fx.Node) -> tuple[Tensor, ...]:
    """Return the tensors in the value of `node`: itself, or those in its lists and tuples at any depth."""
    return tuple(_tensors_in(value_of(node)))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


def results_of(gm: fx.GraphModule) -> tuple[Any, ...]:
    """Return what `gm` returns, mostly nodes; one result that is not in a tuple is a tuple of one."""
    (output,) = gm.graph.find_nodes(op="output")
    results = output.args[0]
    return tuple(results) if isinstance(results, tuple | list) else (results,)


def shape_of(node: fx.Node) -> tuple[Dim, ...] | None:
    """Return the shape of a tensor node, symbolic where it was captured so; None for any other node."""
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, Tensor) else None


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """Return the dtype that a tensor node has at run time, under autocast too; None for any other node."""
    value = value_of(node)
    return value.dtype if isinstance(value, Tensor) else None


def device_of(node: fx.Node) -> torch.device | None:
    """Return the device of a tensor node; None for any other node."""
    value = value_of(node)
    return value.device if isinstance(value, Tensor) else None


def requires_grad(node: fx.Node) -> bool:
    """Return whether a gradient flows into `node`; False for what is not a tensor."""
    value = value_of(node)
    return isinstance(value, Tensor) and value.requires_grad


def location_of(node: fx.Node) -> str:
    """Return "file.py:123", the innermost line of the model's own source, not torch's; "" where unknown."""
    return location_in(FRAME.findall(node.meta.get("stack_trace") or ""))


def location_in(frames: Iterable[tuple[str, int | str]]) -> str:
    """Return "file.py:123", the innermost of these files and lines that is the model's own; "" where none is.

    Neither torch nor fxopt nor Python's own library is.
    Where a module of torch is all there is of the model, it is a line of that module's.
    """
    frames = tuple(frames)
    own = [
        frame
        for frame in frames
        if not (is_of_standard_library(frame[0]) or frame[0].startswith((TORCH_FOLDER, FXOPT_FOLDER)))
    ]
    torchs = [frame for frame in frames if frame[0].startswith(MODULES_FOLDER)]
    path, line = next(reversed(own or [f for f in torchs if not f[0].endswith(CALLING)]), ("", ""))
    return f"{os.path.basename(path)}:{line}" if path else ""


def own_location_in(frames: Iterable[tuple[str, int]]) -> str:
    """Return "fxopt/file.py:123" where the innermost of these files and lines is one of fxopt's own, else ""."""
    path, line = next(reversed(tuple(frames)), ("", 0))
    if not path.startswith(FXOPT_FOLDER):
        return ""
    return f"{os.path.relpath(path, os.path.dirname(os.path.dirname(FXOPT_FOLDER)))}:{line}"


def is_of_standard_library(path: str) -> bool:
    """Return whether the file at `path` is of Python's own library: `contextlib`, `functools` and the like."""
    is_inside = path.startswith(LIBRARY_FOLDER) and not path.startswith(PACKAGES_FOLDERS)
    return is_inside or path.startswith("<frozen ")


def module_of(node: fx.Node) -> str:
    """Return the path, from the captured root, of the module in which `node` was computed; "" for the root.

    >>> node = fx.Graph().placeholder("x")
    >>> node.meta["nn_module_stack"] = {"1": ("L['self'].model.layers[0].mlp", object)}
    >>> module_of(node)
    'model.layers.0.mlp'
    >>> node.meta["nn_module_stack"] = {"1": ("L['args'][0].model.layers.0.mlp", object)}
    >>> module_of(node)
    'model.layers.0.mlp'
    >>> node.meta["nn_module_stack"] = {"1": ("L['self'].__dict__['_modules']['base'].head", object)}
    >>> module_of(node)
    'base.head'
    >>> node.meta["nn_module_stack"] = {"1": ("L['self'].model.named_parameters.__self__.norm", object)}
    >>> module_of(node)
    'model.norm'
    """
    return next(reversed(modules_of(node)), "")


def modules_of(node: fx.Node) -> tuple[str, ...]:
    """Return the paths, from the captured root, of the modules that were running at `node`, outermost first."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    return tuple(_module_path(path) for path, _ in stack.values())


def _module_path(path: str) -> str:
    path = SUBSCRIPT.sub(r".\1", OWNER.sub("", CHILDREN.sub("", path.removeprefix(GIVEN))))
    parts = [part for part in path.split(".") if part]
    # A Dynamo path starts with "L" or "G" and the name of the local that holds the root.
    return ".".join(parts[2:] if parts and parts[0] in ("L", "G") else parts)


def find_subgraphs(gm: fx.GraphModule, prefix: str = "") -> Iterator[tuple[str, fx.GraphModule]]:
    """Yield `gm` and the bodies of its higher-order ops at any depth, each once, with its nodes' prefix.

    The prefix of `gm` itself is `prefix`; that of a body ends in "/". Bodies that are not run as they
    stand (a score function, an autograd formula) are left out.
    """
    yield prefix, gm
    seen: set[str] = set()
    for node in gm.graph.find_nodes(op="get_attr"):
        body = getattr(gm, str(node.target), None)
        if isinstance(body, fx.GraphModule) and node.target not in seen and _is_inlined(node):
            seen.add(str(node.target))
            yield from find_subgraphs(body, f"{prefix}{node.target}/")


def _is_inlined(body: fx.Node) -> bool:
    return bool(body.users) and all(getattr(user.target, "_name", "") in INLINED for user in body.users)
