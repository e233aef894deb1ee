"""Which calls of a model are captured behind its backbone: those that could not be captured whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from fxopt.capture import torch_dynamo, torch_errors
from fxopt.capture.backbone import Backbone, find_backbone
from fxopt.capture.engines import Sharding
from fxopt.capture.ledger import Ledger
from fxopt.capture.model_entry import model_entry
from fxopt.capture.modules import tensors_of
from fxopt.capture.trunk import TailMismatch
from fxopt.capture.undo import Before
from fxopt.report.records import MODEL_REGION


class Behind:
    """The calls of one model that are captured behind its backbone, by their forms."""

    def __init__(
        self,
        model: nn.Module,
        blocks: frozenset[nn.Module],
        around: tuple[nn.Module, ...],
        backend: Callable[..., Any],
        sharding: Sharding,
        ledger: Ledger,
        count_eager: Callable[[], None],
    ) -> None:
        self._model, self._blocks, self._around = model, blocks, around
        self._backend, self._sharding, self._ledger = backend, sharding, ledger
        self._count_eager = count_eager
        self._backbone: Backbone | None = None
        self._forms: set[Any] = set()
        self.compile_anew()

    def compile_anew(self) -> None:
        """Give Dynamo a frame anew, which has no captures."""
        self.compiled = torch_dynamo.compile_frame(model_entry, self._backend, fullgraph=True)

    @property
    def is_running(self) -> bool:
        """Whether the stock forward is being run up to the backbone right now."""
        return self._backbone is not None and self._backbone.is_running

    def serves(self, form: Any) -> bool:
        """Return whether calls of `form` are captured so."""
        return form in self._forms

    def is_empty(self) -> bool:
        """Return whether no calls are."""
        return not self._forms

    def forget(self, form: Any) -> None:
        """Let calls of `form` be captured so no longer."""
        self._forms.discard(form)

    def is_possible(self) -> bool:
        """Return whether the model has a backbone whose calls can be interrupted: on this rank alone, with values."""
        if self._backbone is None:
            is_alone = not self._sharding.find_modules() and not self._sharding.find_gatherings()
            module = find_backbone(self._model, self._blocks) if is_alone else None
            if module is not None and not any(tensor.is_meta for tensor in tensors_of(self._model)):
                self._backbone = Backbone(self._model, module, self._run_compiled, self._around)
        return self._backbone is not None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns.

        Raises:
            TailMismatch: something is in the way; the forward ran to its end, or not at all.
        """
        assert self._backbone is not None, "no call is captured behind a backbone"
        obstacle = self._backbone.find_obstacle(kwargs)
        if obstacle is not None:
            raise TailMismatch(obstacle)
        self._ledger.begin(MODEL_REGION)
        return self._backbone.run(args, kwargs)

    def attempt(
        self,
        form: Any,
        reason: str,
        explain: Callable[[Exception], str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any] | str:
        """Return what the model returns, or why this call cannot be captured behind the backbone either.

        It could not be captured whole for `reason`; explain(error) says why this was not.
        """
        assert self._backbone is not None
        before, name = Before(self._model), type(self._backbone.module).__name__
        try:
            output = self.run(*args, **kwargs)
        except torch_errors.CAPTURE_ERRORS as error:
            before.undo()
            return f"nor behind the {name}: {explain(error)}"
        except TailMismatch as mismatch:
            if mismatch.output is None:
                return f"nor behind the {name}: {mismatch}"
            self._ledger.count_fallback(MODEL_REGION, str(mismatch))
            return mismatch.output
        self._forms.add(form)
        self._ledger.note(
            f"the model was captured behind its {name}, and what stands in that around the blocks runs stock: {reason}"
        )
        return (output,)

    def check(self, gm: fx.GraphModule) -> None:
        """Check what Dynamo has captured; see `Backbone.check`."""
        assert self._backbone is not None
        self._backbone.check(gm)

    def _run_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.compiled(self._model, self._count_eager, args, kwargs)
