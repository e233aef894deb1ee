"""DeepSpeed's ZeRO-3: hooks on each module gather its own parameters for its forward and its backward, and free them.

A compiled region calls none of the modules it computes, so their hooks are called around it: all are gathered before
it, what goes in is passed through what frees them after its backward, and what comes out through what gathers them
for it. Where a region runs stock its modules are gathered so too: ranks that differ in what they compile gather in
one order. Modules without parameters of their own are not followed: nothing hangs on it. `forwards` does so for
blocks, and for the length of a model's forward for what is outside of them; `engines.Sharding` does it for the tail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from fxopt.capture import deepspeed_private, torch_modules
from fxopt.capture.deepspeed_private import MODULE_HOOKS, STAGE_3, is_partitioned
from fxopt.graph.torch_private import TORCH_LINEAR, tree_leaves, tree_map

PRE, POST = torch_modules.FORWARD_HOOK_DICTS


def is_zero_hook(hook: Any) -> bool:
    """Return whether `hook` is one by which ZeRO-3 follows a module, or a wrapper around such a one."""
    return _comes_from(hook, MODULE_HOOKS)


def is_engine_hook(hook: Any) -> bool:
    """Return whether `hook` follows a module or, for one that is gathered with all inside, reduces its gradients."""
    return _comes_from(hook, MODULE_HOOKS) or _comes_from(hook, STAGE_3)


def _comes_from(hook: Any, name: str) -> bool:
    """Return whether `hook` is a function of the module called `name`, or a wrapper around such a one."""
    queue = [hook] if name in sys.modules else []
    seen: set[int] = set()
    while queue:
        function = queue.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        if deepspeed_private.is_of(function, name):
            return True
        if str(getattr(function, "__module__", "")).partition(".")[0] not in ("deepspeed", "torch"):
            continue
        cells = getattr(function, "__closure__", None) or ()
        queue += filter(
            callable, (getattr(function, "__wrapped__", None), *map(deepspeed_private.content_of, cells))
        )
    return False


def is_there() -> bool:
    """Return whether this process has ZeRO-3 at hand."""
    return MODULE_HOOKS in sys.modules


def whole_shape(tensor: Any) -> tuple[int, ...]:
    """Return the shape that `tensor` has while it is gathered."""
    return tuple(getattr(tensor, deepspeed_private.SHAPE)) if is_partitioned(tensor) else tuple(tensor.shape)


def group_of(module: nn.Module) -> Any:
    """Return the process group whose ranks share the parameters of `module`, or what trains them, or None."""
    return deepspeed_private.group_of(module) if is_there() else None


@dataclasses.dataclass(frozen=True)
class Gathering:
    """The hooks by which ZeRO-3 follows one module.

    Of two `before` its forward the first gathers its parameters, the second passes its inputs through what frees them
    in backward; of two `after` it the first frees them, the second passes its outputs through what gathers them.
    """

    module: nn.Module
    before: tuple[Callable[..., Any], ...]
    after: tuple[Callable[..., Any], ...]

    @property
    def has_parameters(self) -> bool:
        """Whether there is anything to gather."""
        return bool(self._parameters())

    @property
    def is_gathered(self) -> bool:
        """Whether the parameters are whole now."""
        return all(parameter.numel() for parameter in self._parameters())

    def _parameters(self) -> list[torch.Tensor]:
        """Return the parameters gathered with this module: of what DeepSpeed calls a leaf, all that are inside."""
        is_leaf = getattr(self.module, deepspeed_private.LEAF, False)
        return [each for each in self.module.parameters(recurse=is_leaf) if is_partitioned(each)]

    def gather(self) -> None:
        """Gather the parameters; each such call wants one of `free`."""
        self.before[0](self.module, ())

    def free(self) -> None:
        """Free the parameters, unless another module reads them now."""
        self.after[0](self.module, (), None)

    def wrap_inputs(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return `tensors` so that the parameters are freed when the gradients of all of them are there."""
        return self.before[1](self.module, tuple(tensors))

    def wrap_outputs(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return `tensors` so that the parameters are gathered when the gradient of one of them is there."""
        return self.after[1](self.module, (), tuple(tensors))


def find_gatherings(modules: Iterable[nn.Module]) -> list[Gathering]:
    """Return how ZeRO-3 follows those of `modules` that it does follow; what begins a whole step is none of it."""
    found: list[Gathering] = []
    for module in modules if is_there() else ():
        before, after = (
            tuple(hook for hook in getattr(module, name).values() if is_zero_hook(hook))
            for name in (PRE, POST)
        )
        if before and after:
            found.append(Gathering(module, before[-2:], after))
    return found


@contextlib.contextmanager
def gathered(gatherings: Sequence[Gathering]) -> Iterator[None]:
    """Gather the parameters of modules, in their order, for the length of the scope."""
    with contextlib.ExitStack() as stack:
        for gathering in gatherings:
            gathering.gather()
            stack.callback(gathering.free)
        yield


def wrap_inputs(gatherings: Iterable[Gathering], values: Any) -> Any:
    """Return `values`, the inputs of a region that reads the parameters of modules, wrapped for each of these."""
    for gathering in gatherings:
        values = _wrap(gathering.wrap_inputs, values)
    return values


def wrap_outputs(gatherings: Iterable[Gathering], values: Any) -> Any:
    """Return `values`, the outputs of a region that reads the parameters of modules, wrapped for each of these."""
    for gathering in gatherings:
        values = _wrap(gathering.wrap_outputs, values)
    return values


def _wrap(wrap: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]], values: Any) -> Any:
    wrapped = iter(wrap([value for value in tree_leaves(values) if _has_gradient(value)]))
    return tree_map(lambda value: next(wrapped) if _has_gradient(value) else value, values)


def _has_gradient(value: Any) -> bool:
    """Return whether `value` is a tensor of a graph of gradients; logits that nobody read yet are in none."""
    return type(value) in (torch.Tensor, nn.Parameter) and value.requires_grad


def is_linear_replaced() -> bool:
    """Return whether DeepSpeed's is in the place of `torch.nn.functional.linear`, as for good after ZeRO-3 began."""
    return deepspeed_private.is_linear(nn.functional.linear)


def captured_linear() -> Callable[..., Any]:
    """Return what is to be `torch.nn.functional.linear` while a region is captured: torch's own for DeepSpeed's.

    DeepSpeed's keeps no view of a weight for backward, which would keep the whole of it. Patterns know torch's own, and
    a compiled region keeps the parameters themselves.
    """
    return TORCH_LINEAR if is_linear_replaced() else nn.functional.linear


@contextlib.contextmanager
def linear_put(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Let `torch.nn.functional.linear` be `function` within the scope; yields what it is else."""
    found = nn.functional.linear
    nn.functional.linear = function
    try:
        yield found
    finally:
        nn.functional.linear = found


def parameters_in_plain_dicts(module: nn.Module) -> AbstractContextManager[None]:
    """Keep the parameters in `module` in plain dictionaries within the scope: ZeRO-3's own gather what is read."""
    return torch_modules.parameters_in_plain_dicts(module) if is_there() else contextlib.nullcontext()
