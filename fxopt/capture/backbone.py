"""A model captured behind its backbone, the module that holds all blocks, where the way to the blocks cannot be.

Models with images look at values on that way: the sizes of images, the places of their tokens. Of such a call the
stock forward runs up to the backbone's return, where it is interrupted; the rest of it is captured on what the backbone
returned. What stands in the backbone around its compiled blocks, a last norm for one, then runs stock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fxopt.capture import torch_dynamo, torch_modules, torch_settings
from fxopt.capture.hooks import has_own_hooks, hooks_hidden, place_of_hook
from fxopt.capture.modules import tensors_of, walk
from fxopt.capture.places import with_place
from fxopt.capture.recorders import active, find_asked
from fxopt.capture.tail import TailRefusal, is_repeatable
from fxopt.capture.trunk import Trunk
from fxopt.graph.names import op_name
from fxopt.graph.view import location_of

TENSOR = "tensor"
CONSTANT = "constant"
MOST_FORMS = 16
"""Of what a backbone returns: each is a capture."""
Form = tuple[Any, Any]
"""What a backbone returned without its tensors: a kind, and what belongs to it."""


def find_backbone(model: nn.Module, blocks: frozenset[nn.Module]) -> nn.Module | None:
    """Return the outermost module below `model` that holds all `blocks` and stands beside other weights, or None."""
    holder = model
    while True:
        children = [child for child in torch_modules.children_of(holder).values() if child is not None]
        inside = [child for child in children if not blocks.isdisjoint(walk(child))]
        if len(inside) != 1 or inside[0] in blocks or _is_container(inside[0]):
            return None
        (found,) = inside
        if any(tensors_of(child) for child in children if child is not found):
            return found
        holder = found


def _is_container(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward


class Backbone:
    """Makes the calls of one model that are captured behind its backbone."""

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        compiled: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        around: tuple[nn.Module, ...],
    ) -> None:
        self.module = module
        self.path = walk(model)[module]
        self._model = model
        self._compiled = compiled
        self._around = around
        self._trunk = Trunk(model)
        self._returned: list[torch.Tensor] = []
        self._traced = Traced()
        self._entries: dict[Form, Callable[..., Any]] = {}

    @property
    def is_running(self) -> bool:
        """Whether the stock forward is being run up to the backbone right now."""
        return self._trunk.is_running

    def find_obstacle(self, kwargs: dict[str, Any]) -> str | None:
        """Return why a call may not be captured behind the backbone: others compile it, or a hook would not run."""
        if torch_modules.SLOT in self.module.__dict__:
            return f"the {self._name} is compiled by somebody else"
        if active() or find_asked((self._model, *self._find_outside()), kwargs):
            return f"outputs are collected in the {self._name} for what stands around it"
        if len(self._entries) > MOST_FORMS:
            return f"the {self._name} returned constants of its own in {MOST_FORMS} calls"
        for module in self._find_outside():
            if has_own_hooks(module):
                reason = f"a hook sits on the {type(module).__name__}, outside the {self._name}"
                return with_place(reason, place_of_hook(self._model, module))
        return None

    def _find_outside(self) -> list[nn.Module]:
        outside = walk(self._model, but=(self.module,))
        return [module for module in outside if module is not self._model]

    @property
    def _name(self) -> str:
        return f"{type(self.module).__name__} {self.path}"

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the model returns.

        Raises:
            TailMismatch: the backbone was not called, or returned what cannot be taken apart.
        """
        with torch_modules.called_by(self.module, self._note):
            ((form, values),) = self._trunk.run(args, kwargs, 1, frozenset({0}), _judge)
        if form not in self._entries:
            self._entries[form] = self._make_entry(build(form))
        self._returned[:] = values
        try:
            with (
                torch_modules.called_by(self.module, self._entries[form]),
                torch_settings.tensors_left_unlisted(self._around),
                hooks_hidden(self._find_outside(), lambda hook: True),
            ):
                return self._compiled(args, kwargs)
        finally:
            self._returned.clear()

    def _note(self, *args: Any, **kwargs: Any) -> Any:
        """Call the backbone as stock does, and end the trunk with what it returned."""
        value = torch_modules.stock_call(self.module, *args, **kwargs)
        tensors: list[torch.Tensor] = []
        form = take_apart(value, tensors)
        flat: Any = (form, tensors)
        if form is None:
            flat = f"the {self._name} returned a {type(value).__name__}, which holds more than tensors"
        return self._trunk.after_block(value, flat)

    def _make_entry(self, rebuild: Callable[[list[torch.Tensor]], Any]) -> Callable[..., Any]:
        """Return what stands for the backbone's call while Dynamo traces: what it returned before."""
        module, returned, traced = self.module, self._returned, self._traced

        @torch.compiler.assume_constant_result
        def note_before() -> bool:
            return traced.note_before()

        def entry(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():  # another thread's call
                return torch_modules.stock_call(module, *args, **kwargs)
            note_before()
            return rebuild(returned)

        return entry

    def check(self, gm: fx.GraphModule) -> None:
        """Check that `gm`, which Dynamo has captured, does nothing twice.

        Raises:
            TailRefusal: before the backbone something random or in place was done, or the backbone is called again.
        """
        self._traced.check(gm, self._name)


class Traced:
    """What Dynamo had traced of one capture when it came to the backbone: the stock forward has done that already."""

    def __init__(self) -> None:
        self._capture: Any = None
        self._names: frozenset[str] = frozenset()
        self._changes_state = self._is_called_again = False

    def note_before(self) -> bool:
        """Note what was traced so far; called while Dynamo traces."""
        capture = torch_dynamo.find_capture()
        self._is_called_again = self._capture is capture
        self._capture = capture
        self._names = frozenset(node.name for node in capture.graph.nodes)
        self._changes_state = torch_dynamo.changes_python_state()
        return True

    def check(self, gm: fx.GraphModule, name: str) -> None:
        """Check what was traced before the backbone `name` in `gm`; see `Backbone.check`."""
        self._capture = None
        if self._is_called_again:
            raise TailRefusal(f"the {name} is called more than once")
        if self._changes_state:
            raise TailRefusal(f"before the {name} Python objects are changed, which would be done twice")
        for node in gm.graph.nodes:
            if node.name in self._names and not is_repeatable(node):
                raise TailRefusal(
                    f"before the {name} it reads {op_name(node) or node.name} at {location_of(node)}, which may give "
                    "another value when it is computed again"
                )


def _judge(values: list[Any]) -> str | None:
    return values[0] if isinstance(values[0], str) else None


def take_apart(value: Any, tensors: list[torch.Tensor]) -> Form | None:
    """Return `value` without its tensors, which go to `tensors`; None where it holds something else."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return TENSOR, len(tensors) - 1
    if value is None or isinstance(value, bool | int | float | str):
        return CONSTANT, value
    if type(value) in (tuple, list):
        names, items = (), tuple(value)
    elif isinstance(value, dict) and dataclasses.is_dataclass(value):  # transformers' outputs are both
        names, items = tuple(value), tuple(value.values())
    else:
        return None
    forms = tuple(take_apart(item, tensors) for item in items)
    return None if None in forms else (type(value), (names, forms))


def build(form: Form) -> Callable[[list[torch.Tensor]], Any]:
    """Return a function of tensors that puts them together again; Dynamo traces it."""
    kind, rest = form
    if kind == TENSOR:
        return lambda values: values[rest]
    if kind == CONSTANT:
        return lambda values: rest
    names, forms = rest
    parts = [build(part) for part in forms]
    if not names:
        return lambda values: kind([part(values) for part in parts])
    named = list(zip(names, parts, strict=True))
    return lambda values: kind(**{name: part(values) for name, part in named})
