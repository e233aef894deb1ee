"""What sits in an optimized model's compile slot: each call of the model comes through it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxopt.capture import torch_dynamo, torch_modules
from fxopt.capture.agreement import Agreement
from fxopt.capture.devices import mixture_told
from fxopt.capture.orders import GradientOrder

if TYPE_CHECKING:
    from fxopt.capture.installation import Installation

RECORDED = "torch.export and torch.jit.trace were given the stock model: what they record is not rewritten"

COMPILED_AROUND = (
    "torch.compile holds the model from outside, which is not needed: fxopt.optimize compiles it, and training calls "
    "run without the other"
)


class Slot:
    """The callable in the slot, and the way back to its installation."""

    def __init__(
        self,
        installation: Installation,
        call: Callable[..., Any],
        agreement: Agreement,
        order: GradientOrder,
    ) -> None:
        self.installation = installation
        self._call = call
        self._agreement = agreement
        self._order = order

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, or what only shares its attributes."""
        if torch.compiler.is_dynamo_compiling() and not torch_dynamo.is_recorded():
            if torch.is_grad_enabled():
                return self._call_untraced(args, kwargs)
            return torch_modules.stock_call(self._find_called(), *args, **kwargs)
        caller = find_caller(sys._getframe(1))
        return self._call_for(caller, args, kwargs)

    @torch_dynamo.untraced
    def _call_untraced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call it while somebody else's Dynamo traces the call: nothing of fxopt is for that to see."""
        self.installation.ledger.note(COMPILED_AROUND)
        return self._call_for(self._find_caller_above(), args, kwargs)

    @torch_dynamo.untraced
    def _find_called(self) -> nn.Module:
        return self._find_caller_above() or self.installation.model

    def _find_caller_above(self) -> nn.Module | None:
        """Return the module of the innermost call that came through this slot, or None."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            caller = find_caller(frame)
            if caller is not None and caller.__dict__.get(torch_modules.SLOT) is self:
                return caller
            frame = frame.f_back
        return None

    def _call_for(self, caller: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if caller is not None and caller is not self.installation.model:
            return torch_modules.stock_call(caller, *args, **kwargs)
        if torch_dynamo.is_recorded():
            self.installation.ledger.note(RECORDED)
            return torch_modules.stock_call(self.installation.model, *args, **kwargs)
        with mixture_told(self.installation.model):
            if not torch.is_grad_enabled():
                return self._call(*args, **kwargs)
            self._agreement.check()
            return self._order.run(self._call, *args, **kwargs)


def find_caller(frame: types.FrameType) -> nn.Module | None:
    """Return the module whose call runs in `frame`: the slot of a shallow copy is the original's own.

    `nn.DataParallel` copies a module's attributes into its replicas, this slot among them; they run stock.
    """
    caller = frame.f_locals.get("self") if frame.f_code.co_name == torch_modules.CALLER else None
    return caller if isinstance(caller, nn.Module) else None
