"""Which calls of a model are captured behind its backbone: those that could not be captured whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from fxopt.capture import torch_distributed, torch_dynamo
from fxopt.capture.backbone import Backbone, RanUncaptured, Refusal, find_backbone
from fxopt.capture.engines import gathers
from fxopt.capture.ledger import Ledger
from fxopt.capture.model_entry import model_entry
from fxopt.capture.modules import tensors_of
from fxopt.report.records import MODEL_REGION


class Behind:
    """The calls of one model that are captured behind its backbone."""

    def __init__(
        self,
        model: nn.Module,
        blocks: frozenset[nn.Module],
        around: tuple[nn.Module, ...],
        backend: Callable[..., Any],
        ledger: Ledger,
        explain: Callable[[Exception], str],
    ) -> None:
        self._model, self._blocks, self._around = model, blocks, around
        self._backend, self._ledger, self._explain = backend, ledger, explain
        self._backbone: Backbone | None = None
        self._noted: set[str] = set()
        self.compile_anew()

    def compile_anew(self) -> None:
        """Give Dynamo a frame anew, which has no captures."""
        self.compiled = torch_dynamo.compile_frame(model_entry, self._backend, fullgraph=True)

    @property
    def is_running(self) -> bool:
        """Whether this thread runs the stock forward for a call right now."""
        return self._backbone is not None and self._backbone.is_running

    def note_nested(self) -> None:
        """Note that the model calls itself: a backbone that is called there is not the one of this call."""
        if self._backbone is not None:
            self._backbone.note_nested()

    def find_backbone(self) -> Backbone | None:
        """Return the backbone, where the model has one, and its calls may be left at its return, or None."""
        if self._backbone is None:
            module = find_backbone(self._model, self._blocks)
            if module is not None and not any(tensor.is_meta for tensor in tensors_of(self._model)):
                self._backbone = Backbone(
                    self._model, module, self._blocks, self._run_compiled, self._explain, self._around
                )
        return None if self._is_sharded() else self._backbone

    def run(
        self, form: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str
    ) -> tuple[Any, Refusal | None]:
        """Return what the model returns, and why that was computed without a capture, or None.

        The call, which is of `form`, could not be captured whole for `reason`.
        """
        backbone = self._backbone
        assert backbone is not None, "no call is captured behind a backbone"
        output, refusal = backbone.run(form, args, kwargs)
        place = reason.rpartition("; at ")[2]  # what is said of it may name the number of images
        if refusal is None and place not in self._noted:
            self._noted.add(place)
            self._ledger.note(
                f"the model was captured behind its {backbone.name}, and what stands in that around the blocks runs "
                f"stock: {reason}"
            )
        return output, refusal

    def check(self, gm: fx.GraphModule) -> None:
        """Check what Dynamo has captured; see `Backbone.check`."""
        assert self._backbone is not None
        self._backbone.check(gm)

    def _is_sharded(self) -> bool:
        if torch_distributed.num_ranks() == 1:
            return False
        return gathers(self._model) or any(map(torch_distributed.is_dtensor, self._model.parameters()))

    def _run_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._ledger.begin(MODEL_REGION)  # blocks have begun since
        return self.compiled(self._model, _stop, args, kwargs)


def _stop() -> None:
    raise RanUncaptured
