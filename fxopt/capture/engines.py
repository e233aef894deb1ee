"""Engines that spread a model over ranks: DistributedDataParallel around it, FSDP2 in it.

FSDP2 gathers a module's parameters in a hook before its forward and reduces their gradients in hooks of autograd;
fxopt runs forwards, so it leaves those hooks where they are. Only the tail runs no module's forward: there the hooks
of its modules are called around it (`Sharding`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fxopt.capture import torch_distributed, torch_modules
from fxopt.capture.hooks import Hidden, hide_hooks, show_hooks
from fxopt.capture.modules import walk

DEEPSPEED_HOOKS = "deepspeed.runtime.utils"
PRE, POST = torch_modules.FORWARD_HOOK_DICTS


class SpreadRefusal(Exception):
    """A region computes with tensors that are spread over ranks; it runs stock, for the reason in the text."""


def is_engine_hook(hook: Any) -> bool:
    """Return whether an engine put `hook` on an output, to learn where backward begins: FSDP2, or DeepSpeed."""
    deepspeed = sys.modules.get(DEEPSPEED_HOOKS)
    is_deepspeeds = deepspeed is not None and getattr(hook, "__globals__", None) is vars(deepspeed)
    return is_deepspeeds or torch_distributed.is_fsdp_hook(hook)


def inside_engine(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, or `model` itself."""
    engine = torch_distributed.ddp_class()
    inside: Any = model
    while engine is not None and isinstance(inside, engine):
        inside = inside.module
    return inside


def check_spread(values: Sequence[Any]) -> None:
    """Check that no input of a captured graph is spread over ranks: the ops rewritten to know whole tensors.

    Raises:
        SpreadRefusal: one is, as under a tensor parallel plan.
    """
    for value in values:
        if torch_distributed.is_dtensor(value):
            raise SpreadRefusal(
                f"a tensor of shape {tuple(value.shape)} is spread over ranks while the module runs "
                "(tensor parallel), expected whole tensors"
            )


def say_kept(module: nn.Module) -> str | None:
    """Return how an engine keeps the weights of `module` that no other code may read, or None."""
    for tensor in module.parameters(recurse=False):
        if _is_emptied(tensor):
            return f"a weight of the {type(module).__name__} is empty outside its own forward, as ZeRO-3 keeps it"
        if torch_distributed.is_dtensor(tensor) and not torch_distributed.is_managed(module):
            return f"a weight of the {type(module).__name__} is spread over ranks, as tensor parallel plans have it"
    return None


def find_kept(blocks: Iterable[nn.Module]) -> str | None:
    """Return how an engine keeps a weight in `blocks` where it may not be read, or None: torch's own error varies."""
    found = (say_kept(module) for block in blocks for module in walk(block))
    return next((text for text in found if text is not None), None)


def _is_emptied(tensor: torch.Tensor) -> bool:
    """Return whether a weight's items were taken off it, which leaves a vector: a model's own may be [1, 0, D]."""
    return tensor.dim() == 1 and tensor.numel() == 0


def cast_inputs(block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return a block's arguments as FSDP2's mixed precision casts them before its forward."""
    policy = _policy(block)
    dtype = policy.param_dtype if policy is not None and policy.cast_forward_inputs else None
    return args if dtype is None else _cast(args, dtype), kwargs if dtype is None else _cast(kwargs, dtype)


def cast_output(block: nn.Module, output: Any) -> Any:
    """Return a block's output as FSDP2's mixed precision casts it after its forward."""
    policy = _policy(block)
    dtype = None if policy is None else policy.output_dtype
    return output if dtype is None else _cast(output, dtype)


def gathered_dtype(block: nn.Module, tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype that the sharded `tensor` of `block` has while the block runs."""
    policy = _policy(block)
    return tensor.dtype if policy is None or policy.param_dtype is None else policy.param_dtype


def gathered_device(block: nn.Module, tensor: torch.Tensor) -> torch.device:
    """Return where the sharded `tensor` of `block` lies while the block runs: its shard may wait on the host."""
    state = torch_distributed.fsdp_state_of(block)
    return tensor.device if state is None else torch_distributed.device_of(state)


def _policy(module: nn.Module) -> Any:
    state = torch_distributed.fsdp_state_of(module)
    return None if state is None else torch_distributed.policy_of(state)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    return {name: _cast(item, dtype) for name, item in value.items()} if type(value) is dict else value


class Sharding:
    """The modules of one model, outside its blocks, that FSDP2 shards on their own.

    Dynamo looks at their parameters before any of them runs, so they are gathered when the model's forward
    begins (the hook that would gather them finds that done: no collective is added), and their hooks are hidden
    from the capture. The trunk runs with the hooks; around the tail they are called by `enter` and `leave`.
    """

    def __init__(self, model: nn.Module, blocks: frozenset[nn.Module], around: Sequence[nn.Module]) -> None:
        self._model, self._blocks = model, blocks
        self._around = around
        self._hidden: Hidden = []

    def find_modules(self) -> dict[nn.Module, Any]:
        """Return the sharded modules outside the blocks, the model left out, with their states."""
        found = {
            module: torch_distributed.fsdp_state_of(module) for module in walk(self._model, but=self._blocks)
        }
        return {
            module: state
            for module, state in found.items()
            if state is not None and module is not self._model
        }

    def find_obstacle(self) -> str | None:
        """Return why the tail cannot be run for how modules are sharded now, or None."""
        for module in walk(self._model, but=self._blocks):
            if any(map(_is_emptied, module.parameters(recurse=False))):
                return say_kept(module)
        for module in self._around:
            if module is not self._model and torch_distributed.fsdp_state_of(module) is not None:
                return (
                    f"the {type(module).__name__} around the blocks is sharded on its own, and would never end: "
                    "fully_shard the blocks and the model that fxopt.optimize is given"
                )
        if torch_distributed.fsdp_state_of(self._model) is not None:
            return None
        for module, state in self.find_modules().items():
            if not torch_distributed.is_initialized(state):
                return (
                    f"the {type(module).__name__} after the blocks is sharded, and the model around it is not: "
                    "fully_shard the model too"
                )
        return None

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather the sharded modules and hide FSDP2's hooks on them within the scope."""
        modules = self.find_modules()
        if not modules:
            yield
            return
        for module in modules:
            gather: Any = module
            gather.unshard()
        self._hidden = hide_hooks(modules, torch_distributed.is_fsdp_hook)
        try:
            yield
        finally:
            self._show()

    def _show(self) -> None:
        show_hooks(self._hidden)
        self._hidden = []

    @contextlib.contextmanager
    def hooks_shown(self) -> Iterator[None]:
        """Put the hooks back within the scope: the trunk calls modules as stock does."""
        modules = list(dict.fromkeys(module for module, *_ in self._hidden))
        self._show()
        try:
            yield
        finally:
            self._hidden = hide_hooks(modules, torch_distributed.is_fsdp_hook)

    def judge(self, values: Sequence[Any]) -> str | None:
        """Return why the hooks of sharded modules would change what the tail computes from `values`, or None."""
        for module, state in self.find_modules().items():
            policy = torch_distributed.policy_of(state)
            dtype, kind = policy.param_dtype, type(module).__name__
            tensors = [
                value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()
            ]
            if dtype is not None and policy.cast_forward_inputs and any(t.dtype != dtype for t in tensors):
                return (
                    f"the mixed precision policy of the {kind} casts what the last block returned to {dtype}"
                )
            device = tensors[0].device.type if tensors else "cpu"
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
            if policy.output_dtype not in (None, dtype):
                return f"the mixed precision policy of the {kind} casts its output to {policy.output_dtype}"
        return None

    def enter(self, modules: Sequence[nn.Module], values: list[Any]) -> list[Any]:
        """Do what FSDP2 does before `modules` run, of which `values` are the inputs; return these.

        The gradients of a module's parameters are reduced once those of its inputs are there. The first input
        of the tail stands for all of them.
        """
        inputs: Any = tuple(values)
        for module in modules:
            for hook in self._hooks(module, PRE):
                changed = hook(module, inputs, {})
                inputs = inputs if changed is None else changed[0]
        return list(inputs)

    def leave(self, modules: Sequence[nn.Module], output: Any) -> None:
        """Do what FSDP2 does after `modules` have run, of which `output` is all that was computed."""
        for module in modules:
            for hook in self._hooks(module, POST):
                hook(module, (), output)

    def _hooks(self, module: nn.Module, name: str) -> list[Any]:
        return [
            hook
            for holder, kind, hooks in self._hidden
            if holder is module and kind == name
            for hook in hooks.values()
            if torch_distributed.is_fsdp_hook(hook)
        ]
