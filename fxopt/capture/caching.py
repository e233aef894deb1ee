"""What AOTAutograd's cache on disk needs to know of a graph that calls fxopt's functions.

It stores compiled graphs by what Dynamo captured, and leaves alone any that call a function it knows
nothing of. Of fxopt's functions it is told by the digest of fxopt's whole source: whatever is edited makes another key.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

from torch import fx

from fxopt.graph.view import find_subgraphs

PACKAGE = __name__.partition(".")[0]


def find_cacheable(gm: fx.GraphModule) -> dict[str, str]:
    """Return the names of fxopt's functions that `gm` calls, each with what tells its source apart.

    A function of anybody else's, in a pattern of their own say, is not among them: what calls it is compiled anew in
    each process.
    """
    targets = (
        node.target
        for _, part in find_subgraphs(gm)
        for node in part.graph.nodes
        if node.op == "call_function" and getattr(node.target, "__module__", "").startswith(f"{PACKAGE}.")
    )
    names = {f"{target.__module__}.{target.__name__}" for target in targets}  # pyright: ignore
    return {name: source_digest() for name in sorted(names)}  # their order is a part of the cache's key


@functools.cache
def source_digest() -> str:
    """Return the digest of all Python files of fxopt, kernels and patterns among them."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if name.endswith(".py"):
                digest.update(os.path.relpath(os.path.join(folder, name), root).encode())
                digest.update(Path(folder, name).read_bytes())
    return digest.hexdigest()
