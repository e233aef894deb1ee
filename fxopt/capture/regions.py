"""Which modules fxopt compiles: the repeated blocks, found by structure, and the model around them."""

from __future__ import annotations

import dataclasses
import math

from torch import nn

from fxopt.capture.modules import tensors_of, walk
from fxopt.capture.zero import whole_shape


@dataclasses.dataclass(frozen=True)
class Stack:
    """One list of repeated blocks: `path` of the list, its `blocks` in order, and the paths of these."""

    path: str
    blocks: tuple[nn.Module, ...]
    paths: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Regions:
    """What of a model is compiled: its stacks of blocks and what follows them; without stacks, the whole of it."""

    stacks: tuple[Stack, ...]

    @property
    def blocks(self) -> tuple[tuple[str, nn.Module], ...]:
        """All blocks with their paths, in order, each once."""
        return tuple(
            (path, block)
            for stack in self.stacks
            for path, block in zip(stack.paths, stack.blocks, strict=True)
        )


MIN_SHARE = 0.05
"""A list that holds less than this share of the stacked parameters is not worth a region of its own."""


def find_regions(model: nn.Module) -> Regions:
    """Return the stacks of `model`: the outermost module lists whose members repeat and hold parameters.

    A list counts when it has at least two members, some two of the same class, and the members hold
    parameters. Lists inside a block (experts, heads) belong to that block. A list with a single member
    counts when nothing else does (a one-layer model still has a block).
    """
    lists = [
        (path, module)
        for module, path in walk(model).items()
        if isinstance(module, nn.ModuleList | nn.Sequential) and _num_parameters(module) > 0
    ]
    repeated = [(path, module) for path, module in lists if _repeats(module)]
    candidates = repeated or [(path, module) for path, module in lists if isinstance(module, nn.ModuleList)]
    outermost = [
        (path, module)
        for path, module in candidates
        if not any(path.startswith(f"{other}.") for other, _ in candidates if other != path)
    ]
    if not outermost:
        return Regions(())
    total = sum(_num_parameters(module) for _, module in outermost)
    stacks = [
        _stack(path, module) for path, module in outermost if _num_parameters(module) >= MIN_SHARE * total
    ]
    held = sum(_num_parameters(block) for stack in stacks for block in stack.blocks)
    if held * 2 < _num_parameters(model) and not any(len(stack.blocks) > 1 for stack in stacks):
        return Regions(())
    return Regions(tuple(stacks))


def _stack(path: str, module: nn.Module) -> Stack:
    named = [(name, child) for name, child in module.named_children()]
    prefix = f"{path}." if path else ""
    return Stack(path, tuple(child for _, child in named), tuple(prefix + name for name, _ in named))


def _repeats(module: nn.Module) -> bool:
    classes = [type(child) for child in module.children() if _num_parameters(child) > 0]
    return len(classes) > len(set(classes))


def _num_parameters(module: nn.Module) -> int:
    own = [tensor for tensor in tensors_of(module) if isinstance(tensor, nn.Parameter)]
    return sum(map(math.prod, map(whole_shape, own)))
