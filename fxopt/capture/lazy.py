"""Logits that are computed only when somebody reads them.

A rewritten head computes its loss without building the logits. The model's output still has to carry
them, so it carries a `LazyLogits`: shape, dtype, device, casts, `detach` and slices stay lazy, anything
else computes the stock arithmetic once, with its gradient, from the hidden states and the weights as they were.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from fxopt.capture import torch_distributed, torch_tensors
from fxopt.capture.engines import asks_for_gradients, is_engine_hook
from fxopt.errors import FxoptError, StaleLogitsError
from fxopt.graph.torch_private import tree_leaves, tree_map_only

Step = Callable[[torch.Tensor], torch.Tensor]
CURE = (
    "call the model in evaluation mode, or fxopt.optimize(model, disable=...) with the pattern of the head "
    "(print(fxopt.explain(model)) names it), or fxopt.restore(model)"
)


class LogitsSource:
    """How to compute one step's logits: the stock graph, its inputs, and their versions at the step.

    `inputs` are the values of the graph's placeholders; `graph` runs under the autocast state of the step.
    """

    def __init__(self, graph: torch.fx.GraphModule, inputs: tuple[Any, ...], location: str) -> None:
        self._graph = graph
        self._inputs = inputs
        self._location = location
        self._versions = tuple(_fingerprint(value) for value in inputs)
        self._autocast = tuple(
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in sorted({value.device.type for value in inputs if isinstance(value, torch.Tensor)})
            if torch.amp.is_autocast_available(device)
        )
        self._values: tuple[torch.Tensor, ...] | None = None
        self.computed = False

    def compute(self, index: int) -> torch.Tensor:
        """Return output `index` of the graph, computing all of them at the first read.

        Raises:
            StaleLogitsError: an input changed (an optimizer step, a reshard) since the forward pass.
        """
        if self._values is None:
            for value, version in zip(self._inputs, self._versions, strict=True):
                if _fingerprint(value) != version:
                    written = torch_tensors.version_of(value)
                    if value.numel() == 0 or value.untyped_storage().size() == 0:
                        raise StaleLogitsError(
                            "logits: read after the head's weight was freed, which an engine gathers for the forward "
                            f"pass alone, expected no read of them in training\nat {self._location}\n{CURE}"
                        )
                    raise StaleLogitsError(
                        "logits: read after the head's weight changed, expected a read before the optimizer "
                        f"step, got a weight of shape {tuple(value.shape)} at version {written}\n"
                        f"at {self._location}\nread outputs.logits before optimizer.step(), or call the model again"
                    )
            with torch.inference_mode(False), torch.enable_grad(), torch_tensors.hooks_left_out():
                scopes = [
                    torch.autocast(device, dtype=dtype, enabled=enabled)
                    for device, dtype, enabled in self._autocast
                ]
                for scope in scopes:
                    scope.__enter__()
                try:
                    self._values = tuple(self._graph(*self._inputs))
                finally:
                    for scope in reversed(scopes):
                        scope.__exit__(None, None, None)
            self.computed = True
            self._inputs = ()
            self._versions = ()
        return self._values[index]


def _fingerprint(value: Any) -> tuple[Any, ...] | None:
    if not isinstance(value, torch.Tensor):
        return None
    return (torch_tensors.version_of(value), tuple(value.shape), value.untyped_storage().size())


class LazyLogits(torch.Tensor):
    """A tensor of logits whose values do not exist yet; reading them computes them."""

    _source: LogitsSource
    _index: int
    _parent: LazyLogits | None
    _step: Step | None
    _needs_grad: bool
    _value: torch.Tensor | None
    _engine_hooks: dict[int, Any]
    _sink: Step | None

    @staticmethod
    def make(
        source: LogitsSource,
        index: int,
        form: torch.Tensor,
        device: torch.device,
        needs_grad: bool = True,
        *,
        parent: LazyLogits | None = None,
        step: Step | None = None,
    ) -> LazyLogits:
        """Return output `index` of `source` on `device`, or `step` of `parent`; `form` has shape, strides and dtype."""
        lazy = torch_tensors.make_form(LazyLogits, form, device)
        lazy._source, lazy._index, lazy._needs_grad = source, index, needs_grad
        lazy._parent, lazy._step, lazy._value, lazy._engine_hooks = parent, step, None, OrderedDict()
        lazy._sink = None
        if needs_grad and lazy.dtype.is_floating_point:
            # Code that calls no function of torch's on them, an autograd function's `apply`, would lose their gradient.
            with torch_tensors.without_torch_function():
                lazy.requires_grad_().register_hook(_refuse_gradient)
        return lazy

    def materialize(self) -> torch.Tensor:
        """Return the plain tensor, the same one each time, computing it at the first read."""
        with torch_tensors.without_torch_function():
            if self._value is None:
                parent, step = self._parent, self._step
                if parent is None or step is None:
                    self._value = self._source.compute(self._index)
                else:
                    self._value = _put(step, parent.materialize())
                if self._sink is not None:
                    self._value = _put(self._sink, self._value)
                if self._value.requires_grad:
                    for hook in self._engine_hooks.values():
                        self._value.register_hook(hook)
            return self._value

    def _put_later(self, sink: Step) -> None:
        """Put the values through `sink`, an engine's, when they are computed, or now where they are."""
        with torch_tensors.without_torch_function():
            self._sink = sink
            if self._value is not None:
                self._value = _put(sink, self._value)

    def hook_later(self, hook: Any) -> RemovableHandle:
        """Put an engine's `hook`, which asks where backward begins, on the values if they are ever computed."""
        with torch_tensors.without_torch_function():
            if self._value is not None and self._value.requires_grad:
                return self._value.register_hook(hook)
            handle = RemovableHandle(self._engine_hooks)
            self._engine_hooks[handle.id] = hook
            return handle

    @property
    def is_lazy(self) -> bool:
        """Whether the values have not been computed yet."""
        with torch_tensors.without_torch_function():
            return not self._source.computed

    def __repr__(self, **_: Any) -> str:
        if self.is_lazy:
            return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, not computed)"
        return repr(self.materialize())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.materialize().__deepcopy__(memo)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        lazy = args[0] if args and isinstance(args[0], LazyLogits) else None
        if lazy is not None:
            if func is torch.Tensor.register_hook and is_engine_hook(args[1]):
                return lazy.hook_later(args[1])
            if func in (torch.Tensor.register_hook, torch.Tensor.retain_grad):
                raise FxoptError(
                    f"logits.{func.__name__}: the loss was computed without these logits, expected a tensor that "
                    f"its gradient flows through\n{CURE}"
                )
            if func in _READS_OF_FORM:
                with torch_tensors.without_torch_function():
                    return func(*args, **kwargs)
            if func == torch_distributed.READ_OF_BASE:
                return None
            if func == _READ_OF_GRAD_FN and asks_for_gradients(sys._getframe(1)):
                with torch_tensors.without_torch_function():
                    return lazy._source if lazy._needs_grad else None
            if func in _READS_OF_DDP and torch_distributed.passes_on_outputs(frame := sys._getframe(1)):
                if func == _READ_OF_GRAD_FN and lazy._needs_grad:
                    lazy._put_later(torch_distributed.find_sink(frame))
                # It takes them for an output that nothing has to be done with, and looks for the parameters that get a
                # gradient from the loss, which is computed from all that the logits are.
                return None if func == _READ_OF_GRAD_FN else _extend(lazy, func, args[1:], kwargs)
            if func == _READ_OF_REQUIRES_GRAD:
                with torch_tensors.without_torch_function():
                    return lazy._needs_grad
            if func in _LAZY_STEPS and not _holds_tensor(args[1:], kwargs):
                return _extend(lazy, func, args[1:], kwargs)
        if func in (torch.autograd.grad, torch.autograd.backward):
            _check_gradient_flows(*args, **kwargs)
        read_args, read_kwargs = tree_map_only(LazyLogits, LazyLogits.materialize, (args, kwargs))
        return func(*read_args, **read_kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Reached only where the caller switched __torch_function__ off: compute, as for any other read.
        read_args, read_kwargs = tree_map_only(
            LazyLogits, lambda lazy: lazy.materialize().detach(), (args, kwargs or {})
        )
        return func(*read_args, **read_kwargs)


_READ_OF_GRAD_FN: Any = torch.Tensor.grad_fn.__get__  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
_READS_OF_DDP = (_READ_OF_GRAD_FN, torch.Tensor.clone)
_READ_OF_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # pyright: ignore[reportAttributeAccessIssue]
_READS_OF_FORM = frozenset(
    {
        torch.Tensor.shape.__get__,  # pyright: ignore[reportAttributeAccessIssue]
        torch.Tensor.dtype.__get__,  # pyright: ignore[reportAttributeAccessIssue]
        torch.Tensor.device.__get__,  # pyright: ignore[reportAttributeAccessIssue]
        torch.Tensor.ndim.__get__,  # pyright: ignore[reportAttributeAccessIssue]
        torch.Tensor.is_cuda.__get__,  # pyright: ignore[reportAttributeAccessIssue]
        torch.Tensor.layout.__get__,  # pyright: ignore[reportAttributeAccessIssue]
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.numel,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_complex,
        torch.Tensor.__len__,
        torch.Tensor.stride,
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
    }
)
_LAZY_STEPS = frozenset(
    {
        torch.Tensor.float,
        torch.Tensor.half,
        torch.Tensor.bfloat16,
        torch.Tensor.double,
        torch.Tensor.to,
        torch.Tensor.type,
        torch.Tensor.detach,
        torch.Tensor.__getitem__,
        torch.Tensor.contiguous,
        torch.detach,
    }
)


def _check_gradient_flows(outputs: Any, given: Any = None, *_: Any, inputs: Any = None, **__: Any) -> None:
    """Raise where a gradient is asked for with respect to lazy logits that `outputs` were computed without."""
    asked = [leaf for leaf in tree_leaves((given, inputs)) if isinstance(leaf, LazyLogits)]
    seen: set[Any] = set()
    queue: list[Any] = [
        (leaf.materialize() if isinstance(leaf, LazyLogits) else leaf).grad_fn
        for leaf in tree_leaves(outputs)
        if isinstance(leaf, torch.Tensor)
    ]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue.extend(following for following, _ in node.next_functions)
    for logits in asked:
        if logits.is_lazy or logits.materialize().grad_fn not in seen:
            raise FxoptError(
                "logits: asked for a gradient with respect to them, but this loss was computed without them, "
                f"expected a tensor that its gradient flows through\n{CURE}"
            )


def _refuse_gradient(gradient: torch.Tensor | None) -> None:
    """Raise where a gradient ends at lazy logits, which are no part of any graph."""
    if gradient is not None:
        raise FxoptError(
            "logits: a gradient came back to what stands for logits, expected the values of them in a "
            "torch.autograd.Function\ngive it outputs.logits.clone()"
        )


def _put(step: Step, value: torch.Tensor) -> torch.Tensor:
    """Return `step` of the values of logits, with its gradient whoever reads them first: they are computed once."""
    with (
        torch_tensors.with_torch_function(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch_tensors.hooks_left_out(),
    ):
        return step(value)


def put_through(step: Step, values: Any) -> Any:
    """Return `values` with lazy logits among them put through `step` once they are computed; others are not."""

    def put(lazy: LazyLogits) -> LazyLogits:
        with torch_tensors.without_torch_function():
            form = torch.empty_strided(lazy.shape, lazy.stride(), dtype=lazy.dtype, device="meta")
            source, index, device = lazy._source, lazy._index, lazy.device
        return LazyLogits.make(source, index, form, device, lazy._needs_grad, parent=lazy, step=step)

    return tree_map_only(LazyLogits, put, values)


def _holds_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs)))


def _extend(lazy: LazyLogits, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    has_graph = torch.is_grad_enabled()

    def step(value: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(
            has_graph
        ):  # as it was when the step was taken, not when the values are read
            return func(value, *args, **kwargs)

    with torch_tensors.without_torch_function():
        form = torch.empty_strided(lazy.shape, lazy.stride(), dtype=lazy.dtype, device="meta")
        device, needs_grad = lazy.device, lazy._needs_grad
        source, index = lazy._source, lazy._index
    places = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, str | torch.device)]
    names_type = func is torch.Tensor.type and not (args and isinstance(args[0], torch.dtype))
    if names_type or any(torch.device(place) != device for place in places):
        return step(lazy.materialize())
    on_meta: Any = tree_map_only((str, torch.device), lambda _: torch.device("meta"), (args, kwargs))
    changed = func(form, *on_meta[0], **on_meta[1])
    keeps_graph = (
        has_graph or changed is form
    )  # without gradients too a cast to its own dtype is the tensor itself
    needs_grad = needs_grad and keeps_graph and func not in (torch.Tensor.detach, torch.detach)
    return LazyLogits.make(source, index, changed, device, needs_grad, parent=lazy, step=step)
