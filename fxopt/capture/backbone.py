"""A model captured behind its backbone, the module that holds all blocks, where the way to the blocks cannot be.

Models with images look at values on that way: the sizes of images, the places of their tokens. Of such a call the
stock forward runs up to the backbone's return. There the same forward is captured with what the backbone returned in
the place of its call, and run; the stock forward is left. Where it cannot be captured, the stock forward goes on, and
nothing was done twice. What stands in the backbone around its compiled blocks, a last norm for one, runs stock.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fxopt.capture import torch_dynamo, torch_errors, torch_modes, torch_modules, torch_settings
from fxopt.capture.hooks import has_own_hooks, hooks_hidden, place_of_hook
from fxopt.capture.modules import tensors_of, walk
from fxopt.capture.places import with_place
from fxopt.capture.recorders import active, find_asked
from fxopt.capture.tail import TailRefusal, is_repeatable
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


class BackboneDone(BaseException):
    """Raised in the stock forward when what stands behind the backbone was run; not an Exception, as `TrunkDone`."""


@dataclasses.dataclass
class Run:
    """One run of the stock forward: what the rest is captured with, what comes of it, or why it was not."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    forward: Any
    around: torch_modes.Around
    refusal: str
    is_entered: bool = False
    output: Any = None
    attributes: dict[nn.Module, dict[str, Any]] = dataclasses.field(
        default_factory=dict[nn.Module, dict[str, Any]]
    )


class OfThread(threading.local):
    """The run of this thread."""

    run: Run | None = None


class Backbone:
    """Makes the calls of one model that are captured behind its backbone."""

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        compiled: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        explain: Callable[[Exception], str],
        around: tuple[nn.Module, ...],
    ) -> None:
        self.module = module
        self.path = walk(model)[module]
        self.name = f"{type(module).__name__} {self.path}"
        self._model = model
        self._compiled, self._explain = compiled, explain
        self._around = around
        self._thread = OfThread()
        self._returned: list[torch.Tensor] = []
        self._traced = Traced(self.name)
        self._entries: dict[Form, Callable[..., Any]] = {}

    @property
    def is_running(self) -> bool:
        """Whether this thread runs the stock forward for a call right now, so that a nested call is a stock one."""
        return self._thread.run is not None

    def note_nested(self) -> None:
        """Note that the model calls itself in this thread's run, if there is one."""
        run = self._thread.run
        if run is not None and not run.is_entered:
            run.is_entered, run.refusal = True, "the model calls itself"

    def find_obstacle(self, kwargs: dict[str, Any]) -> str | None:
        """Return why this call may not be captured behind the backbone, as others may, or None."""
        if self.module.__dict__.get(torch_modules.SLOT) is not None:
            return f"the {self.name} is compiled by somebody else"
        if active() or find_asked((self._model, *self._find_outside()), kwargs):
            return f"outputs are collected in the {self.name} for what stands around it"
        for module in self._find_outside():
            if has_own_hooks(module):
                reason = f"a hook sits on the {type(module).__name__}, outside the {self.name}"
                return with_place(reason, place_of_hook(self._model, module))
        return None

    def _find_outside(self) -> list[nn.Module]:
        outside = walk(self._model, but=(self.module,))
        return [module for module in outside if module is not self._model]

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str | None]:
        """Return what the model returns, and why that is from the stock forward alone, or None.

        Where the rest is captured, the stock forward is left at the backbone's return: what it does to attributes of
        modules while it is left is undone, since what was captured has done it.
        """
        copied_args, copied_kwargs = copy_containers(args), copy_containers(kwargs)
        own = self._model.__dict__.get("forward")
        run = Run(
            copied_args, copied_kwargs, own, torch_modes.find_around(), f"the {self.name} was not called"
        )
        self._thread.run = run
        try:
            with torch_modules.called_by(self.module, self._call):
                return self._model.forward(*args, **kwargs), run.refusal
        except BackboneDone:
            for module, attributes in run.attributes.items():
                module.__dict__.clear()
                module.__dict__.update(attributes)
            return run.output, None
        finally:
            self._thread.run = None
            self._returned.clear()
            self._traced.clear()

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the backbone as stock does; then, the first time in a run, run what was captured behind it."""
        run = self._thread.run
        if run is None or run.is_entered:  # another thread's call, or one within the backbone or after it
            return torch_modules.stock_call(self.module, *args, **kwargs)
        run.is_entered = True
        value = torch_modules.stock_call(self.module, *args, **kwargs)
        refusal = self._run_rest(run, value)
        if refusal is None:
            raise BackboneDone
        run.refusal = refusal
        return value

    def _run_rest(self, run: Run, value: Any) -> str | None:
        """Run what was captured, on what the backbone returned; return why that cannot be."""
        tensors: list[torch.Tensor] = []
        form = take_apart(value, tensors)
        if form is None:
            return f"the {self.name} returned a {type(value).__name__}, which holds more than tensors"
        if torch_modes.find_around() != run.around:
            return f"the {self.name} is called in a context of its own (checkpointing, autocast, without gradients)"
        if self._model.__dict__.get("forward") is not run.forward:
            return "the model's forward puts another one in its place"
        if form not in self._entries:
            if len(self._entries) == MOST_FORMS:
                return f"the {self.name} returned constants of its own in {MOST_FORMS} calls"
            self._entries[form] = self._make_entry(build(form))
        self._returned[:] = tensors
        outside = self._find_outside()
        try:
            with (
                torch_modules.called_by(self.module, self._entries[form]),
                torch_settings.tensors_left_unlisted(self._around),
                hooks_hidden(outside, lambda hook: True),
            ):
                run.output = self._compiled(run.args, run.kwargs)
        except torch_errors.CAPTURE_ERRORS as error:
            return self._explain(error)
        run.attributes = {module: dict(module.__dict__) for module in (self._model, *outside)}
        return None

    def _make_entry(self, rebuild: Callable[[list[torch.Tensor]], Any]) -> Callable[..., Any]:
        """Return what stands for the backbone's call while Dynamo traces: what it returned before."""
        module, returned, traced = self.module, self._returned, self._traced

        @torch.compiler.assume_constant_result
        def note_before() -> bool:
            return traced.note_before()

        def entry(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_dynamo_compiling():  # another thread's call
                return torch_modules.stock_call(module, *args, **kwargs)
            note_before()
            return rebuild(returned)

        return entry

    def check(self, gm: fx.GraphModule) -> None:
        """Check that `gm`, which Dynamo has captured, does nothing twice.

        Raises:
            TailRefusal: before the backbone something random or in place was done, or the backbone is called again.
        """
        self._traced.check(gm)


class Traced:
    """What Dynamo had traced of one capture when it came to the backbone `name`: the stock forward has done that."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.clear()

    def clear(self) -> None:
        """Forget the capture."""
        self._capture: Any = None
        self._names: frozenset[str] = frozenset()
        self._refusal = ""

    def note_before(self) -> bool:
        """Note what was traced so far; called while Dynamo traces."""
        capture = torch_dynamo.find_capture()
        is_again, self._capture = self._capture is capture, capture
        self._names = frozenset(node.name for node in capture.graph.nodes)
        self._refusal = ""
        if is_again:
            self._refusal = f"the {self._name} is called more than once"
        elif torch_dynamo.is_nested(capture):
            self._refusal = f"the {self._name} is called inside a nested graph (checkpointing)"
        elif torch_dynamo.changes_python_state():
            self._refusal = f"before the {self._name} Python objects are changed, which would be done twice"
        return True

    def check(self, gm: fx.GraphModule) -> None:
        """Check what was traced before the backbone in `gm`; see `Backbone.check`."""
        if self._refusal:
            raise TailRefusal(self._refusal)
        if torch_dynamo.changes_given_mappings():
            raise TailRefusal("a mapping that the model is given is changed")
        for node in gm.graph.nodes:
            if node.name in self._names and not is_repeatable(node):
                raise TailRefusal(
                    f"before the {self._name} it reads {op_name(node) or node.name} at {location_of(node)}, which may "
                    "give another value when it is computed again"
                )


def copy_containers(value: Any) -> Any:
    """Return `value` with its mappings, lists and tuples copied, and what is in them as it is."""
    if type(value) is dict:
        return {key: copy_containers(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([copy_containers(item) for item in value])
    return value


def take_apart(value: Any, tensors: list[torch.Tensor]) -> Form | None:
    """Return `value` without its tensors, which go to `tensors`; None where it holds something else."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return TENSOR, len(tensors) - 1
    if value is None or type(value) in (bool, int, str):
        return CONSTANT, (type(value), value)
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
        _, constant = rest
        return lambda values: constant
    names, forms = rest
    parts = [build(part) for part in forms]
    if not names:
        return lambda values: kind([part(values) for part in parts])
    named = list(zip(names, parts, strict=True))
    return lambda values: kind(**{name: part(values) for name, part in named})
