"""A block whose loop over hits hangs on values, captured with the loop's body in its graph once, for any hit.

Models loop over the experts that some token chose, `for expert in mask.sum(...).gt(0).nonzero()`. How many there are is
known when it runs, so Dynamo breaks there. Under `OneTurn`, which Dynamo traces along with the block, `nonzero` of a
vector gives something that loops once, and what the body does with its number stands in the graph as the ops of
`fxopt/graph/turns.py`. That is no program yet: `fxopt/graph/lift.py` makes one of it, or refuses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxopt.graph.torch_private import FakeTensor, tree_leaves
from fxopt.graph.turns import END, ONE_HIT, ROWS, SKIPS


class Hits:
    """What `nonzero` of a vector gives a loop: one row, whose number is any that was hit."""

    def __init__(self, hits: torch.Tensor) -> None:
        self.hits = hits

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield the number of one hit, as a vector of one item, and mark where its turn ends."""
        number = ONE_HIT(self.hits)
        yield number
        END(number)


class OneTurn(TorchFunctionMode):
    """Captures loops over hits for one turn."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or what stands for it where its result hangs on values."""
        if len(args) == 1 and not kwargs:
            if func is torch.Tensor.nonzero and args[0].ndim == 1:
                return Hits(args[0])
            if func is torch.where and args[0].ndim == 2:
                return ROWS(args[0])
        if len(args) == 2:
            first, second = args
            if func in (torch.Tensor.__eq__, torch.Tensor.eq) and _is_number(first) and type(second) is int:
                SKIPS(first, second)
                return False
            if func is torch.Tensor.__getitem__ and isinstance(second, torch.Tensor) and _is_number(second):
                return first.index_select(0, second.reshape(1)).squeeze(0)
        return func(*args, **(kwargs or {}))


def _is_number(value: torch.Tensor) -> bool:
    return value.ndim == 0 and value.dtype == torch.int64


MOST_DISTANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Of a block's first result captured for one turn from stock's, as a ratio of norms; in other dtypes:"""
MOST_DISTANCE_IN_HALF = 0.05


class StockCheck:
    """A block's result against stock's: what a loop counts in Python would be counted once, and no graph shows it.

    Rounding in another order may let a token choose another expert, so that results are close, not equal. Stock runs
    on a copy of the block with the same weights: what a block notes down is noted once.
    """

    def __init__(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self._block, self._args, self._kwargs = block, args, kwargs
        devices = {each.device for each in block.parameters() if each.device.type == "cuda"}
        self._random = torch.random.get_rng_state()
        self._random_on = {device: torch.cuda.get_rng_state(device) for device in devices}
        self._buffers = [(buffer, buffer.clone()) for buffer in block.buffers()]

    def agrees(self, output: Any) -> bool:
        """Return whether stock returns about the same, run once more from the same random state.

        Where nothing has values, on the meta device or under stand-ins, there is nothing to compare: True.
        """
        ours = [value for value in tree_leaves(output) if isinstance(value, torch.Tensor)]
        if any(value.device.type == "meta" or isinstance(value, FakeTensor) for value in ours):
            return True
        devices = [device.index for device in self._random_on]
        with torch.random.fork_rng(devices), torch.no_grad():
            self._put_random_state_back()
            weights: dict[int, Any] = {id(each): each for each in self._block.parameters()}
            stock = copy.deepcopy(self._block, weights).forward(*self._args, **self._kwargs)
        theirs = [value for value in tree_leaves(stock) if isinstance(value, torch.Tensor)]
        return len(ours) == len(theirs) and all(map(_is_close, ours, theirs))

    def undo(self) -> None:
        """Put the random state and the block's buffers back to where they were, for the block to run once more."""
        self._put_random_state_back()
        with torch.no_grad():
            for buffer, before in self._buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)

    def _put_random_state_back(self) -> None:
        torch.random.set_rng_state(self._random)
        for device, state in self._random_on.items():
            torch.cuda.set_rng_state(state, device)


def _is_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    if not ours.is_floating_point():
        return True
    most = MOST_DISTANCE.get(ours.dtype, MOST_DISTANCE_IN_HALF)
    distance = (ours.detach().float() - theirs.float()).norm()
    return bool(distance <= most * theirs.float().norm())


def turns_entry(block: nn.Module, count_eager: Callable[[], None], args: Any, kwargs: Any) -> Any:
    """Run `block`'s forward with its loops captured for one turn; as `block_entry`, uncaptured it runs stock."""
    if not torch.compiler.is_compiling():
        count_eager()
        return block.forward(*args, **kwargs)
    with OneTurn():
        return block.forward(*args, **kwargs)
