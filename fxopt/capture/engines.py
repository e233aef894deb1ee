"""Engines that spread a model over ranks: DistributedDataParallel around it, FSDP2 or DeepSpeed's ZeRO-3 in it.

FSDP2 gathers a module's parameters in a hook before its forward and reduces their gradients in hooks of autograd;
fxopt runs forwards, so it leaves those hooks where they are. Only the tail runs no module's forward: there the hooks
of its modules are called around it (`Sharding`). So are ZeRO-3's, which has hooks on the modules in blocks too: `zero`
tells them, and `forwards` calls those of blocks.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fxopt.capture import deepspeed_private, torch_distributed, torch_modules, zero
from fxopt.capture.deepspeed_private import OUTPUT_HOOKS
from fxopt.capture.hooks import Hidden, hide_hooks, is_gathering_hook, show_hooks
from fxopt.capture.modules import walk

PRE, POST = torch_modules.FORWARD_HOOK_DICTS


class SpreadRefusal(Exception):
    """A region computes with tensors that are spread over ranks; it runs stock, for the reason in the text."""


def is_engine_hook(hook: Any) -> bool:
    """Return whether an engine put `hook` on an output, to learn where backward begins: FSDP2, or DeepSpeed."""
    return deepspeed_private.is_of(hook, OUTPUT_HOOKS) or torch_distributed.is_fsdp_hook(hook)


def asks_for_gradients(frame: types.FrameType) -> bool:
    """Return whether code that runs in `frame` reads a gradient function to know whether to put such a hook there."""
    deepspeed = sys.modules.get(OUTPUT_HOOKS)
    return deepspeed is not None and frame.f_globals is vars(deepspeed)


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


def gathers(model: nn.Module) -> bool:
    """Return whether parameters in `model` are gathered from all ranks while it runs: under FSDP2 or ZeRO-3."""
    is_managed = any(torch_distributed.fsdp_state_of(module) is not None for module in model.modules())
    return is_managed or any(map(zero.is_partitioned, model.parameters()))


def say_kept(module: nn.Module) -> str | None:
    """Return how an engine keeps the weights of `module` that no other code may read, or None."""
    for tensor in module.parameters(recurse=False):
        if _is_emptied(tensor) and not zero.is_partitioned(tensor):
            return f"a weight of the {type(module).__name__} is empty outside its own forward"
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
    """The modules of one model, outside its blocks, that FSDP2 shards on their own or whose parameters ZeRO-3 keeps.

    Dynamo looks at their parameters before any of them runs, so they are gathered when the model's forward
    begins (the hook that would gather them finds that done: no collective is added), and their hooks are hidden
    from the capture. The trunk runs with the hooks; around the tail they are called by `run`. FSDP2's are gathered
    here; ZeRO-3's already around the model's forward (`forwards.call_model_gathered`), which frees them at its end.
    """

    def __init__(self, model: nn.Module, blocks: frozenset[nn.Module], around: Sequence[nn.Module]) -> None:
        self._model, self._blocks = model, blocks
        self._around = around
        self._hidden: Hidden = []
        self._gatherings: dict[nn.Module, zero.Gathering] = {}
        self._linear: Callable[..., Any] | None = None

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
            own = torch_modules.own_parameters(module)
            if any(map(_is_emptied, own)) and say_kept(module):
                return say_kept(module)
            if any(parameter.grad_fn is not None for parameter in own):
                return (
                    f"a weight of the {type(module).__name__} is computed while the model runs, as "
                    "FullyShardedDataParallel, the first FSDP, has it: use fully_shard"
                )
        for gathering in zero.find_gatherings(self._around):
            if gathering.has_parameters:
                return (
                    f"the {type(gathering.module).__name__} around the blocks has parameters of its own, which ZeRO-3 "
                    "gathers for the whole call"
                )
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

    def find_gatherings(self) -> list[zero.Gathering]:
        """Return how ZeRO-3 follows the modules outside the blocks; not where it keeps one gathered around all."""
        outside = walk(self._model, but=self._blocks) if zero.is_there() else ()
        found = zero.find_gatherings(outside)
        return [] if any(each.has_parameters and each.module in self._around for each in found) else found

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather the modules that FSDP2 shards, and hide its hooks and ZeRO-3's on modules within the scope.

        What DeepSpeed has in the place of torch's own `linear`, under ZeRO-3 and ever after, is hidden as well.
        """
        modules = self._gather()
        self._gatherings = {each.module: each for each in self.find_gatherings() if each.has_parameters}
        if not modules and not self._gatherings and not zero.is_linear_replaced():
            yield
            return
        self._hidden = hide_hooks((*modules, *self._gatherings), is_gathering_hook)
        try:
            with zero.linear_put(zero.captured_linear()) as self._linear:
                yield
        finally:
            self._linear = None
            self._show()

    def _gather(self) -> dict[nn.Module, Any]:
        modules = self.find_modules()
        for module in modules:
            gather: Any = module
            gather.unshard()
        return modules

    def find_stock_forward(self) -> Callable[..., Any] | None:
        """Return the model's own forward, which first gathers what it does where it is served; None: that is nothing.

        Ranks on which a call is served begin with that, and all ranks have to gather in one order.
        """
        if not self.find_modules() or self.find_obstacle() is not None:
            return None

        def run(*args: Any, **kwargs: Any) -> Any:
            self._gather()
            return self._model.forward(*args, **kwargs)

        return run

    def _show(self) -> None:
        show_hooks(self._hidden)
        self._hidden = []

    @contextlib.contextmanager
    def hooks_shown(self) -> Iterator[None]:
        """Put the hooks back within the scope: the trunk calls modules as stock does."""
        modules = list(dict.fromkeys(module for module, *_ in self._hidden))
        self._show()
        linear = self._linear
        try:
            with contextlib.nullcontext() if linear is None else zero.linear_put(linear):
                yield
        finally:
            self._hidden = hide_hooks(modules, is_gathering_hook)

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

    def run(self, modules: Sequence[nn.Module], values: list[Any], call: Callable[..., Any]) -> Any:
        """Return what `call` computes from `values` in the place of `modules`, with what an engine does around these.

        The gradients of a module's parameters are reduced once those of its inputs are there. The first input
        of the tail stands for all of them.
        """
        inputs: Any = tuple(values)
        for module in modules:
            for hook in self._hooks(module, PRE):
                changed = hook(module, inputs, {})
                inputs = inputs if changed is None else changed[0]
        gatherings = self._gatherings_of(modules)
        with zero.gathered(gatherings):
            output = call(*zero.wrap_inputs(gatherings, inputs))
            for module in modules:
                for hook in self._hooks(module, POST):
                    hook(module, (), output)
        return zero.wrap_outputs(gatherings, output)

    def find_wrapper(self, modules: Sequence[nn.Module]) -> Callable[[Any], Any] | None:
        """Return what does as `run` with an output that is computed later, or None: nothing."""
        gatherings = self._gatherings_of(modules)
        return functools.partial(zero.wrap_outputs, gatherings) if gatherings else None

    def _gatherings_of(self, modules: Sequence[nn.Module]) -> list[zero.Gathering]:
        return [self._gatherings[module] for module in modules if module in self._gatherings]

    def _hooks(self, module: nn.Module, name: str) -> list[Any]:
        return [
            hook
            for holder, kind, hooks in self._hidden
            if holder is module and kind == name
            for hook in hooks.values()
            if torch_distributed.is_fsdp_hook(hook)
        ]
