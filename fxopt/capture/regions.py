"""Which modules fxopt compiles: the repeated blocks, found by structure, and the model around them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container

from torch import nn

from fxopt.capture import torch_modules
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


TORCHS_OWN = frozenset(kind for kind in vars(nn).values() if isinstance(kind, type))
MIN_SHARE = 0.05
"""A list that holds less than this share of the stacked parameters is not worth a region of its own."""


def find_regions(model: nn.Module) -> Regions:
    """Return the stacks of `model`: the outermost lists of blocks that hold parameters.

    A list counts when it has at least two members, some two of the same class; a module list of one module made of
    others is one of several blocks that happens to have one. Lists inside a block (experts, heads) belong to that
    block. Members that cannot be called (lists of a list, a layer's modules by name) are no blocks, nor are single
    layers of torch's own in a module list, between which the model computes. Named modules count as a list where all
    are of one class and made of others. Where nothing repeats, each of the outermost module lists counts. Single
    blocks that hold less than half of the parameters beside tables of the vocabulary are no region: the whole model
    is.
    """
    lists = [
        (path, module)
        for module, path in walk(model).items()
        if (isinstance(module, nn.ModuleList | nn.Sequential) or _is_of_blocks(module))
        and _num_parameters(module) > 0
        and _are_called(module)
    ]
    counted = [(path, module) for path, module in lists if _repeats(module) or _is_of_one_block(module)]
    candidates = counted or [(path, module) for path, module in lists if isinstance(module, nn.ModuleList)]
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
    if any(len(stack.blocks) > 1 for stack in stacks) or _hold_most(stacks, model):
        return Regions(tuple(stacks))
    return Regions(())


def _are_called(module: nn.Module) -> bool:
    """Return whether the members of a list can be called, and are more than single layers of torch's own."""
    members = list(module.children())
    if any(torch_modules.forward_of(type(member)) is nn.Module.forward for member in members):
        return False
    are_layers = all(type(member) in TORCHS_OWN and not any(member.children()) for member in members)
    return isinstance(module, nn.Sequential) or not are_layers


def _is_of_blocks(module: nn.Module) -> bool:
    """Return whether `module` holds blocks by name: several of one class, made of modules themselves."""
    entries = list(module.children())
    is_equal = len(entries) > 1 and len(set(map(type, entries))) == 1
    return isinstance(module, nn.ModuleDict) and is_equal and all(any(entry.children()) for entry in entries)


def _is_of_one_block(module: nn.Module) -> bool:
    """Return whether `module` is a module list of one entry that is made of modules itself."""
    entries = list(module.children())
    return isinstance(module, nn.ModuleList) and len(entries) == 1 and any(entries[0].children())


def _hold_most(stacks: list[Stack], model: nn.Module) -> bool:
    """Return whether `stacks` hold half of the parameters of `model`, those left aside with one row per token.

    These, embeddings and heads, are most of a model that has few layers, whatever its blocks are.
    """
    tables = {module.num_embeddings for module in walk(model) if isinstance(module, nn.Embedding)}
    held = sum(_num_parameters(block, tables) for stack in stacks for block in stack.blocks)
    return held * 2 >= _num_parameters(model, tables)


def _stack(path: str, module: nn.Module) -> Stack:
    named = [(name, child) for name, child in module.named_children()]
    prefix = f"{path}." if path else ""
    return Stack(path, tuple(child for _, child in named), tuple(prefix + name for name, _ in named))


def _repeats(module: nn.Module) -> bool:
    classes = [type(child) for child in module.children() if _num_parameters(child) > 0]
    return len(classes) > len(set(classes))


def _num_parameters(module: nn.Module, tables: Container[int] = ()) -> int:
    """Return the number of the parameters of `module`, those left out whose first size is one of `tables`."""
    own = [tensor for tensor in tensors_of(module) if isinstance(tensor, nn.Parameter)]
    return sum(math.prod(shape) for shape in map(whole_shape, own) if not shape or shape[0] not in tables)
