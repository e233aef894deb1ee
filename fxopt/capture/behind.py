"""A model captured in pieces around its backbone, the module that holds all blocks, where it cannot be captured whole.

Models with images look at values on the way to their blocks: the sizes of images, the places of their tokens. Of such a
call Dynamo captures the frames that lead to the backbone up to its call, which runs as stock does, around compiled
blocks, and goes on behind it with what these frames hold: head and loss are one graph as ever. Nothing is done twice.
What stands in the backbone around its blocks, a last norm for one, runs stock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fxopt.capture import torch_distributed, torch_dynamo, torch_errors, torch_modules, torch_settings
from fxopt.capture.engines import gathers
from fxopt.capture.hooks import has_own_hooks, hooks_hidden, place_of_hook
from fxopt.capture.ledger import Ledger
from fxopt.capture.model_entry import model_entry
from fxopt.capture.modules import tensors_of, walk
from fxopt.capture.passed_over import Forward, find_passed_over, forwards_of, note_passed_over
from fxopt.capture.patched import find_replaced
from fxopt.capture.pieces import or_as_captured
from fxopt.capture.places import with_place
from fxopt.capture.reasons import reason_of_failure, reason_of_frame
from fxopt.capture.recorders import active, find_asked
from fxopt.errors import FxoptError, VerifyError
from fxopt.report.records import MODEL_REGION

NOT_CAPTURED = "what stands after the blocks was not captured"
CANNOT = "within a try statement Dynamo cannot go on, and what else stopped it TORCH_LOGS=graph_breaks tells"


def find_backbone(model: nn.Module, blocks: frozenset[nn.Module]) -> nn.Module | None:
    """Return the outermost module below `model` that holds all `blocks` and stands beside other weights, or None."""
    holder = model
    while True:
        children = [child for child in torch_modules.children_of(holder).values() if child is not None]
        inside = [child for child in children if not blocks.isdisjoint(walk(child))]
        if (
            len(inside) != 1
            or inside[0] in blocks
            or torch_modules.forward_of(type(inside[0])) is nn.Module.forward
        ):
            return None
        (found,) = inside
        if any(tensors_of(child) for child in children if child is not found):
            return found
        holder = found


def _without(frames: list[Any], known: list[Any]) -> list[Any]:
    identities = set(map(id, known))
    return [frame for frame in frames if id(frame) not in identities]


def _count_nothing() -> None:
    """Count no call: what ran uncaptured is told by what did not run captured."""


class OfThread(threading.local):
    """Whether this thread runs such a call and its backbone has run, and what was met in it."""

    is_running = False
    is_after = False
    mistake: BaseException | None = None
    within: list[Any]
    """Of the frames that Dynamo has passed over, those of the backbone, whose blocks tell of themselves."""


class Behind:
    """The calls of one model that are captured in pieces around its backbone."""

    def __init__(
        self,
        model: nn.Module,
        blocks: frozenset[nn.Module],
        around: tuple[nn.Module, ...],
        backend: Callable[..., Any],
        ledger: Ledger,
    ) -> None:
        self._model, self._blocks, self._around = model, blocks, around
        self._backend, self._ledger = backend, ledger
        self._compile_piece = or_as_captured(self._compile, ledger, MODEL_REGION)
        self._thread = OfThread()
        self._noted: set[str] = set()
        self._limits: set[str] = set()
        """What stopped Dynamo in this model's calls in no function that it names."""
        self._failure = ""
        """Why a piece could not be compiled, where one could not."""
        self._backbone: nn.Module | None = None
        self._path = ""
        self._entry = torch_dynamo.untraced(self._call_backbone)
        self._frames = {
            mode: torch_dynamo.FramesByForm(model_entry, self._compile_piece, fullgraph=False)
            for mode in (True, False)
        }
        """By whether the model trains, which only the first of its frames is guarded by: others return lazy logits."""

    @property
    def frames(self) -> tuple[Callable[..., Any], ...]:
        """The frames that Dynamo captures the model in."""
        return tuple(frame for frames in self._frames.values() for frame in frames.frames())

    def compile_anew(self) -> None:
        """Have Dynamo capture the model anew."""
        self._limits.clear()
        self._failure = ""
        for frames in self._frames.values():
            frames.clear()

    def _compile(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Compile one piece; what Dynamo or the piece itself would pass over as a failure is kept, to be raised."""
        try:
            return self._backend(gm, example_inputs)
        except (FxoptError, VerifyError, torch.OutOfMemoryError) as error:
            self._thread.mistake = error
            self._failure = reason_of_failure(error)
            raise
        except Exception as error:
            self._failure = reason_of_failure(error)
            self._thread.mistake = torch_errors.cause_to_raise(error) or self._thread.mistake
            raise

    @property
    def is_running(self) -> bool:
        """Whether this thread runs such a call right now, so that a nested call of the model is a stock one."""
        return self._thread.is_running

    @property
    def is_after(self) -> bool:
        """Whether the backbone of this thread's last such call has run."""
        return self._thread.is_after

    def find_backbone(self) -> nn.Module | None:
        """Return the backbone, where the model has one and is captured around it, or None."""
        if self._backbone is not None and not self._is_in_place(self._backbone):
            self._backbone = None
        if self._backbone is None and not any(tensor.is_meta for tensor in tensors_of(self._model)):
            self._backbone = find_backbone(self._model, self._blocks)
            self._path = "" if self._backbone is None else walk(self._model)[self._backbone]
        return None if self._is_sharded() else self._backbone

    def _is_in_place(self, backbone: nn.Module) -> bool:
        """Return whether the backbone still is where it was found: a user may have put another one there."""
        try:
            return self._model.get_submodule(self._path) is backbone
        except AttributeError:
            return False

    def name_of(self, backbone: nn.Module) -> str:
        """Return what to call the backbone: class and path."""
        return f"{type(backbone).__name__} {self._path}"

    def find_obstacle(self, backbone: nn.Module, kwargs: dict[str, Any]) -> str | None:
        """Return why this call may not be captured around the backbone, or None."""
        name, outside = self.name_of(backbone), self._find_outside(backbone)
        if backbone.__dict__.get(torch_modules.SLOT) is not None:
            return f"the {name} is compiled by somebody else"
        if active() or find_asked((self._model, *outside), kwargs):
            return f"outputs are collected in the {name} for what stands around it"
        replaced = find_replaced((self._model, *outside))
        if replaced is not None:
            return (
                f"the forward of the {type(replaced).__name__} is another package's, which is left as it is"
            )
        for module in outside:
            if has_own_hooks(module):
                reason = f"a hook sits on the {type(module).__name__}, outside the {name}"
                return with_place(reason, place_of_hook(self._model, module))
        return None

    def run(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
        """Return what the model returns; what ran uncaptured behind the backbone is counted.

        The call could not be captured whole for `reason`.
        """
        self._ledger.begin(MODEL_REGION)
        self._thread.is_running, self._thread.is_after = True, False
        known, self._thread.within = torch_dynamo.frames_passed_over(), []
        try:
            with (
                torch_modules.called_by(backbone, self._entry),
                torch_settings.tensors_left_unlisted(self._around),
                hooks_hidden(self._find_outside(backbone), lambda hook: True),
                torch_dynamo.frames_of_pieces_captured(),
                torch_settings.failures_suppressed(True),
            ):
                frame = self._frames[self._model.training].frame_of(args, kwargs)
                output = frame(self._model, _count_nothing, args, kwargs)
        except Exception as error:  # the user's own: the next call may be right
            self._note_passed_over(torch_dynamo.capture_again(error, self._find_new(known)))
            raise
        finally:
            self._thread.is_running = False
            mistake, self._thread.mistake = self._thread.mistake, None
        if mistake is not None:
            raise mistake
        self._note_passed_over(self._find_new(known))
        self._tell(backbone, reason)
        return output

    def _find_new(self, known: list[Any]) -> list[Any]:
        """Return the frames that Dynamo has passed over since it knew `known`, outside of the backbone."""
        return _without(torch_dynamo.frames_passed_over(), known + self._thread.within)

    def _note_passed_over(self, frames: list[Any]) -> None:
        self._limits.update(reason_of_frame(frame) for frame in frames if frame.co_name is None)
        note_passed_over((frame for frame in frames if frame.co_name is not None), self._find_forwards())

    def _find_forwards(self) -> frozenset[Forward]:
        return forwards_of((self._model, *self._find_outside(self._backbone)))

    def _call_backbone(self, *args: Any, **kwargs: Any) -> Any:
        """Call the backbone as stock does; another thread's call of it meanwhile is no part of a run."""
        assert self._backbone is not None
        if not self._thread.is_running:
            return torch_modules.stock_call(self._backbone, *args, **kwargs)
        known = torch_dynamo.frames_passed_over()
        try:
            with torch_settings.failures_suppressed(False):
                output = torch_modules.stock_call(self._backbone, *args, **kwargs)
        finally:
            self._thread.within += _without(torch_dynamo.frames_passed_over(), known)
        self._ledger.begin(MODEL_REGION)  # blocks have begun since
        self._thread.is_after = True
        return output

    def _tell(self, backbone: nn.Module, reason: str) -> None:
        """Note how a call that could not be captured whole was, or count it."""
        name = self.name_of(backbone)
        functions = find_passed_over(self._find_forwards()) | self._limits
        if not self._ledger.is_served:
            cause = "; ".join(sorted(functions)) or self._failure or CANNOT
            text = (
                f"{NOT_CAPTURED}: {reason}; nor behind the {name}, where Dynamo went on in no frame: {cause}"
            )
            self._ledger.count_fallback(MODEL_REGION, text)
            return
        for function in sorted(functions - self._noted):
            self._noted.add(function)
            self._ledger.note(f"around the {name} this runs as stock, but for what it calls: {function}")
        place = reason.rpartition("; at ")[2]  # what is said of it may name the number of images
        if place not in self._noted:
            self._noted.add(place)
            self._ledger.note(
                f"the model was captured behind its {name}, and what stands in that around the blocks runs stock: "
                f"{reason}"
            )

    def _find_outside(self, backbone: nn.Module | None) -> list[nn.Module]:
        outside = walk(self._model, but=() if backbone is None else (backbone,))
        return [module for module in outside if module is not self._model]

    def _is_sharded(self) -> bool:
        if torch_distributed.num_ranks() == 1:
            return False
        return gathers(self._model) or any(map(torch_distributed.is_dtensor, self._model.parameters()))
