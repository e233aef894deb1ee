"""The call of the whole model: stock Python up to the last block, then the compiled tail.

Dynamo captures the model's forward once with each block as one leaf (`leaf_stand_in`); the tail of that
capture is compiled. At a call, the compiled frame checks its guards and runs the trunk, which is the stock
forward, interrupted when the last block has returned (`TrunkDone`), and then the tail on the blocks' values.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxopt.capture import torch_compat
from fxopt.capture.dispatch import accepts, call_with_forward, find_opaque, takes_any
from fxopt.capture.hooks import find_hooks, has_hooks
from fxopt.capture.ledger import Ledger
from fxopt.capture.tail import Tail, TailRefusal
from fxopt.graph.view import modules_of

REGION = "model"


class TrunkDone(BaseException):
    """Raised when the last block of the trunk has returned; not an Exception, so that nothing swallows it."""


class TailMismatch(Exception):
    """The blocks' values at this call are not of the form the tail was compiled for."""


def model_entry(model: nn.Module, count_eager: Callable[[], None], args: Any, kwargs: Any) -> Any:
    """Run `model`'s forward; Dynamo captures this frame, and what runs it uncaptured is counted."""
    if not torch.compiler.is_compiling():
        count_eager()
    return model.forward(*args, **kwargs)


class ModelCall:
    """Makes the calls of one model whose blocks are regions of their own."""

    def __init__(
        self,
        ledger: Ledger,
        model: nn.Module,
        blocks: dict[str, nn.Module],
        backend: Callable[..., Any],
    ) -> None:
        self.ledger = ledger
        self.model = model
        self.blocks = frozenset(blocks.values())
        self.compiled = torch_compat.compile_frame(model_entry, backend, fullgraph=True)
        self.obstacle = ""
        self._settings = torch_compat.make_capture_settings()
        self._takes_cache = accepts(model.forward, "use_cache") or (
            takes_any(model.forward)
            and any(accepts(inner.forward, "use_cache") for inner in find_around(model, self.blocks))
        )
        self._trunk: list[Any] | None = None
        self._trunk_length = 0
        self._arguments: tuple[Any, Any] = ((), {})
        self._forms: dict[Any, Any] = {}
        self._standing_in = False
        self._checkpointed: frozenset[nn.Module] = frozenset()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model: with the compiled tail where fxopt serves the call, else stock Python."""
        model = self.model
        with torch_compat.capture_scope(self._settings):
            if not torch.is_grad_enabled() or self._trunk is not None:
                return torch_compat.stock_call(model, *args, **kwargs)
            kwargs = self._without_cache(kwargs)
            reason = self.find_obstacle(args, kwargs)
            if reason is None:
                try:
                    if has_hooks(model):
                        return call_with_forward(model, self._run_compiled, args, kwargs)
                    return self._run_compiled(*args, **kwargs)
                except torch_compat.CAPTURE_ERRORS as error:
                    cause = _root_cause(error)
                    reason = str(cause) if isinstance(cause, TailRefusal) else torch_compat.reason_of(error)
                    reason = f"what stands after the blocks was not captured: {reason}"
                    self.obstacle = reason
                    self.ledger.refused[REGION] = reason
                except TailMismatch as error:
                    reason = str(error)
            self.ledger.count_fallback(REGION, reason)
            return torch_compat.stock_call(model, *args, **kwargs)

    def find_obstacle(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Return why the tail cannot serve this call, or None."""
        if self.obstacle:
            return self.obstacle
        if torch_compat.has_global_hooks():
            return "hooks for all modules are registered"
        for block in self.blocks:
            hooked = block if has_hooks(block) else find_hooks(block).live
            if hooked is not None:
                return (
                    f"a hook sits on a {type(hooked).__name__} of a block and may keep what the forward reads"
                )
        asked = find_asked_outputs(self.model, kwargs)
        if asked is not None:
            return f"{asked} is asked for, which hooks collect on the way"
        return find_opaque(args, kwargs)

    def _without_cache(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return `kwargs` with the key/value cache declined, unless the caller asked for one."""
        if not self._takes_cache or "use_cache" in kwargs or kwargs.get("past_key_values") is not None:
            return kwargs
        self.ledger.note("training calls run with use_cache=False: a key/value cache is not read in training")
        return {**kwargs, "use_cache": False}

    def _run_compiled(self, *args: Any, **kwargs: Any) -> Any:
        self.ledger.current = REGION
        previous = self._arguments
        self._arguments = (args, kwargs)
        try:
            with self._leaves():
                return self.compiled(self.model, self._count_eager, args, kwargs)
        finally:
            self._arguments = previous

    def _count_eager(self) -> None:
        self.ledger.count_fallback(REGION, "Dynamo ran the model uncaptured")

    @contextlib.contextmanager
    def _leaves(self) -> Iterator[None]:
        """Make Dynamo take a block's call through its compile slot, where a leaf sits, not to its forward.

        Dynamo goes straight to `forward` unless a module's `_call_impl` is not the stock method. Where
        checkpointing wraps `__call__` (transformers before it wrapped `forward`), the leaf would end up
        inside it, so its switch is off for the call and `call_block` does the same from within.
        """
        self._checkpointed = frozenset(block for block in self.blocks if checkpoints_calls(block))
        for block in self.blocks:
            block.__dict__["_call_impl"] = functools.partial(torch_compat.stock_call, block)
        for block in self._checkpointed:
            block.__dict__["gradient_checkpointing"] = False
        try:
            yield
        finally:
            for block in self._checkpointed:
                block.__dict__["gradient_checkpointing"] = True
            self._checkpointed = frozenset()
            for block in self.blocks:
                block.__dict__.pop("_call_impl", None)

    def call_block(
        self, block: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a block in the trunk through `run`, checkpointed where its own call would have been."""
        if block in self._checkpointed:
            checkpoint: Any = block._gradient_checkpointing_func
            return self.after_block(checkpoint(functools.partial(run, **kwargs), *args))
        return self.after_block(run(*args, **kwargs))

    def leaf_stand_in(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return stand-ins of the form `block` returns for these stand-in arguments."""
        if self._standing_in:
            return torch_compat.stock_call(block, *args, **kwargs)
        first = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if torch_compat.is_fake(leaf))
        mode = torch_compat.fake_mode_of(first)
        forms, spec = pytree.tree_flatten((args, kwargs))
        key = (
            type(block),
            str(spec),
            tuple(
                (str(f.shape), f.dtype, f.requires_grad) if torch_compat.is_fake(f) else str(f) for f in forms
            ),
            id(mode),
        )
        if key not in self._forms:
            self._standing_in = True
            try:
                state = {
                    name: torch_compat.make_stand_in(mode, tensor)
                    for name, tensor in (*block.named_parameters(), *block.named_buffers())
                }
                with torch_compat.real_tensors_allowed(mode):
                    out = torch.func.functional_call(block, state, args, kwargs)
            finally:
                self._standing_in = False
            self._forms[key] = out
        return pytree.tree_map_only(torch.Tensor, _like, self._forms[key])

    def after_block(self, value: Any) -> Any:
        """Note a block's value while the trunk runs; interrupt the trunk after the last one."""
        if self._trunk is None:
            return value
        self._trunk.append(value)
        if len(self._trunk) == self._trunk_length:
            raise TrunkDone
        return value

    def run_trunk(self, num_leaves: int) -> list[Any]:
        """Run the stock forward up to the last block and return what each block's call returned."""
        args, kwargs = self._arguments
        self._trunk, self._trunk_length = [], num_leaves
        try:
            self.model.forward(*args, **kwargs)
            raise TailMismatch(f"{len(self._trunk)} blocks were called, expected {num_leaves}")
        except TrunkDone:
            return self._trunk
        finally:
            self._trunk = None
            self.ledger.current = REGION

    def compile_tail(self, tail: Tail, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the callable Dynamo runs for a captured model: the trunk, then `call` on its values."""
        leaf_nodes = [node for node in tail.graph.graph.nodes if node.op == "placeholder"][: len(tail.leaves)]
        examples = [node.meta["example_value"] for node in leaf_nodes]
        modules = find_tail_modules(self.model, tail.graph)
        on_meta = any(parameter.is_meta for parameter in self.model.parameters())

        def run(*captured_args: Any) -> Any:
            hooked = next((module for module in modules if has_hooks(module)), None)
            if hooked is not None:
                raise TailMismatch(f"a hook sits on the {type(hooked).__name__} after the blocks")
            values = rehearse(tail.calls) if on_meta else self.run_trunk(len(tail.calls))
            inputs = [values[index] if item is None else values[index][item] for index, item in tail.leaves]
            for value, example in zip(inputs, examples, strict=True):
                _check_form(value, example)
            return call(*inputs, *[captured_args[index] for index in tail.placeholders])

        return run


def checkpoints_calls(block: nn.Module) -> bool:
    """Return whether this block's `__call__`, not its `forward`, recomputes it in the backward pass now."""
    return (
        type(block).__call__ is not nn.Module.__call__
        and block.training
        and getattr(block, "gradient_checkpointing", False) is True
        and callable(getattr(block, "_gradient_checkpointing_func", None))
    )


def find_around(model: nn.Module, blocks: frozenset[nn.Module]) -> tuple[nn.Module, ...]:
    """Return the modules below `model` that hold blocks somewhere inside and are none themselves."""
    return tuple(
        module
        for module in model.modules()
        if module is not model and module not in blocks and any(inner in blocks for inner in module.modules())
    )


def find_tail_modules(model: nn.Module, tail: fx.GraphModule) -> tuple[nn.Module, ...]:
    """Return the modules whose calls the tail holds, `model` itself left out."""
    named = dict(model.named_modules())
    paths: set[str] = set()
    for node in tail.graph.nodes:
        paths.update(modules_of(node))
    return tuple(named[path] for path in sorted(paths) if path and path in named)


def rehearse(calls: tuple[fx.Node, ...]) -> list[Any]:
    """Call the blocks of a model on the meta device, each on inputs of the form its captured call had.

    The stock forward cannot run there: transformers looks at the values of masks.
    """

    def on_meta(node: fx.Node) -> Any:
        example = node.meta["example_value"]
        if not isinstance(example, torch.Tensor):
            return example
        form = torch.empty(tuple(example.shape), dtype=example.dtype, device="meta")
        return form.requires_grad_(example.requires_grad)

    values: list[Any] = []
    for call in calls:
        block_call: Any = call.target
        values.append(block_call(*fx.map_arg(call.args, on_meta), **fx.map_arg(call.kwargs, on_meta)))
    return values


def find_asked_outputs(model: nn.Module, kwargs: dict[str, Any]) -> str | None:
    """Return the name of an extra output (`output_hidden_states`...) that this call or the config asks for."""
    config = getattr(model, "config", None)
    for source in (kwargs, getattr(config, "__dict__", {})):
        for name, value in source.items():
            if (
                name.startswith("output_")
                and value not in (None, False)
                and isinstance(value, int | list | tuple)
            ):
                return name
    return None


def _like(form: torch.Tensor) -> torch.Tensor:
    stand_in = torch.empty_like(form)
    return stand_in.requires_grad_(form.requires_grad) if form.is_floating_point() else stand_in


def _check_form(value: Any, example: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TailMismatch(f"the last block returned a {type(value).__name__}, expected a tensor")
    if (value.dtype, value.ndim, value.requires_grad) != (example.dtype, example.ndim, example.requires_grad):
        raise TailMismatch(
            f"the last block returned {value.dtype} of {value.ndim} dimensions "
            f"(requires_grad={value.requires_grad}), expected {example.dtype} of {example.ndim} "
            f"(requires_grad={example.requires_grad})"
        )
    for size, expected in zip(value.shape, example.shape, strict=True):
        if isinstance(expected, int) and size != expected:
            raise TailMismatch(
                f"the last block returned shape {tuple(value.shape)}, expected {example.shape}"
            )


def is_leaf(node: fx.Node) -> bool:
    """Return whether `node` is the call of a block that was left uncaptured."""
    return node.op == "call_function" and getattr(node.target, "fxopt_leaf", False)


def _root_cause(error: BaseException) -> BaseException:
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    return error
