"""A model captured behind its backbone, the module that holds all blocks, where the way to the blocks cannot be.

Models with images look at values on that way: the sizes of images, the places of their tokens. Of such a call the
stock forward runs up to the backbone's return. There the same forward is captured with what the backbone returned in
the place of its call, and run; the stock forward is left. Where it cannot be captured, the stock forward goes on, and
nothing was done twice. What stands in the backbone around its compiled blocks, a last norm for one, runs stock.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxopt.capture import (
    torch_errors,
    torch_modes,
    torch_modules,
    torch_settings,
    torch_tensors,
)
from fxopt.capture.guarded import is_guarded
from fxopt.capture.hooks import has_own_hooks, hooks_hidden, place_of_hook
from fxopt.capture.modules import tensors_of, walk
from fxopt.capture.places import with_place
from fxopt.capture.recorders import active, find_asked
from fxopt.capture.traced import ReadAnew, Traced

TENSOR = "tensor"
CONSTANT = "constant"
SCALARS = (type(None), bool, int, float, str, torch.dtype, torch.device)
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "fxopt")
"""What their contexts do when they are left may be done twice."""
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


class RanUncaptured(Exception):
    """Raised where Dynamo would run what stands behind the backbone uncaptured, with the backbone once more."""


class BackboneDone(BaseException):
    """Raised in the stock forward when what stands behind the backbone was run; not an Exception, as `TrunkDone`."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a call was not captured; `lasts` if that holds for all calls of its form."""

    reason: str
    lasts: bool


@dataclasses.dataclass
class Run:
    """One run of the stock forward: what the rest is captured with, what comes of it, or why it was not."""

    form: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: Any
    forward: Any
    around: torch_modes.Around
    refusal: Refusal
    is_entered: bool = False
    is_done: bool = False
    output: Any = None


class OfThread(threading.local):
    """The run of this thread."""

    run: Run | None = None


class Backbone:
    """Makes the calls of one model that are captured behind its backbone."""

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        blocks: frozenset[nn.Module],
        compiled: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        explain: Callable[[Exception], str],
        around: tuple[nn.Module, ...],
    ) -> None:
        self.module = module
        self.name = f"{type(module).__name__} {walk(model)[module]}"
        self._model, self._blocks = model, blocks
        self._compiled, self._explain = compiled, explain
        self._around = around
        self._thread = OfThread()
        self._returned: list[torch.Tensor] = []
        self._traced = Traced(self.name, model)
        self._entries: dict[Form, Callable[..., Any]] = {}

    @property
    def is_running(self) -> bool:
        """Whether this thread runs the stock forward for a call right now, so that a nested call is a stock one."""
        return self._thread.run is not None

    def note_nested(self) -> None:
        """Note that the model calls itself in this thread's run, if there is one."""
        run = self._thread.run
        if run is not None and not run.is_entered:
            run.is_entered, run.refusal = True, Refusal("the model calls itself", lasts=False)

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

    def run(self, form: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Refusal | None]:
        """Return what the model returns, and why that is from the stock forward alone, or None.

        Calls of one `form` read the same attributes and globals, or are captured anew.
        """
        given = note_values((args, kwargs))
        own = self._model.__dict__.get("forward")
        not_called = Refusal(f"the {self.name} was not called", lasts=False)
        run = Run(form, args, kwargs, given, own, torch_modes.find_around(), not_called)
        self._thread.run = run
        try:
            with torch_modules.called_by(self.module, self._call):
                output = self._model.forward(*args, **kwargs)
        except BackboneDone:
            return run.output, None
        finally:
            self._thread.run = None
            self._returned.clear()
            self._traced.clear()
        return (run.output, None) if run.is_done else (output, run.refusal)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the backbone as stock does; then, the first time in a run, run what was captured behind it."""
        run = self._thread.run
        if run is None or run.is_entered:  # another thread's call, or one within the backbone or after it
            return torch_modules.stock_call(self.module, *args, **kwargs)
        run.is_entered = True
        given = note_values((args, kwargs))
        with self._traced.watching(run.form):
            value = torch_modules.stock_call(self.module, *args, **kwargs)
        refusal = self._find_refusal(run, given, args, kwargs) or self._run_rest(run, value)
        if refusal is None:
            run.is_done = True
            raise BackboneDone
        run.refusal = refusal
        return value

    def _find_refusal(
        self, run: Run, given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Refusal | None:
        """Return why the rest must not run on what the model was given, now that the backbone has run on `given`."""
        if given is None or run.given is None:
            return Refusal(
                f"the model or the {self.name} is given an object that may have been changed", lasts=True
            )
        if given != note_values((args, kwargs)) or run.given != note_values((run.args, run.kwargs)):
            return Refusal(f"the {self.name}, or what stands before it, changes what it is given", lasts=True)
        line = find_guarded_line(sys._getframe(2), Backbone.run.__code__)
        if line:
            return Refusal(f"the {self.name} is called inside a try or with statement at {line}", lasts=True)
        if torch_modes.find_around()._replace(autocast=()) != run.around._replace(autocast=()):
            reason = f"the {self.name} is called in a context of its own (checkpointing, without gradients)"
            return Refusal(reason, lasts=True)
        if self._model.__dict__.get("forward") is not run.forward:
            return Refusal("the model's forward puts another one in its place", lasts=True)
        if self._traced.stale:
            return Refusal(
                f"the {self.name} changes what is read outside ({self._traced.stale})", lasts=False
            )
        return None

    def _run_rest(self, run: Run, value: Any) -> Refusal | None:
        """Run what was captured, on what the backbone returned; return why that cannot be."""
        tensors: list[torch.Tensor] = []
        form = take_apart(value, tensors)
        if form is None:
            reason = (
                f"the {self.name} returned a {type(value).__name__}, expected tensors and constants in tuples, lists, "
                "dicts by name or outputs of transformers"
            )
            return Refusal(reason, lasts=True)
        if form not in self._entries:
            if len(self._entries) == MOST_FORMS:
                reason = f"the {self.name} returned constants of its own in {MOST_FORMS} calls"
                return Refusal(reason, lasts=False)
            self._entries[form] = self._make_entry(build(form))
        self._returned[:] = tensors
        try:
            with (
                torch_modules.called_by(self.module, self._entries[form]),
                torch_settings.tensors_left_unlisted(self._around),
                hooks_hidden(self._find_outside(), lambda hook: True),
                torch_modes.autocast_as(run.around),
            ):
                run.output = self._compiled(run.args, run.kwargs)
        except RanUncaptured:
            return Refusal("Dynamo ran the model uncaptured", lasts=False)
        except torch_errors.CAPTURE_ERRORS as error:
            root = torch_errors.root_cause(error)
            if isinstance(root, torch.OutOfMemoryError):
                raise root from None
            return Refusal(self._explain(error), lasts=not isinstance(root, ReadAnew))
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


def note_values(value: Any) -> Any:
    """Return what tells whether `value` was changed, by tensors' versions; None where it holds what cannot tell."""
    if isinstance(value, torch.Tensor):
        return id(value), torch_tensors.version_of(value)
    if type(value) in SCALARS:
        return type(value), value
    if isinstance(value, dict):
        keys, items = tuple(value), tuple(value.values())
    elif type(value) in (tuple, list):
        keys, items = (), tuple(value)
    else:
        return None
    noted = tuple(map(note_values, items))
    return None if None in noted else (id(value) if keys else len(items), keys, noted)


def find_guarded_line(frame: types.FrameType | None, last: types.CodeType) -> str:
    """Return the line up from `frame` to that of `last` where a user's code would see that its call is left, or ""."""
    while frame is not None and frame.f_code is not last:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in LIBRARIES and is_guarded(frame.f_code, frame.f_lasti):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def take_apart(value: Any, tensors: list[torch.Tensor]) -> Form | None:
    """Return `value` without its tensors, which go to `tensors`; None where it holds something else."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return TENSOR, len(tensors) - 1
    if value is None or type(value) in (bool, int, str):
        return CONSTANT, (type(value), value)
    if type(value) in (tuple, list):
        names, items = (), tuple(value)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        named: Any = value
        names, items = named._fields, tuple(value)
    elif type(value) is dict or (isinstance(value, dict) and dataclasses.is_dataclass(value)):
        names, items = tuple(value), tuple(value.values())  # transformers' outputs are both
    else:
        return None
    if not all(type(name) is str for name in names):
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
