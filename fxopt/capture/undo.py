"""What a forward pass changes beside its result, put back so that it can run once more."""

from __future__ import annotations

import torch
from torch import nn

from fxopt.capture.torch_modules import CALL, SLOT

SLOTS = (SLOT, CALL)


class Before:
    """The random state, and the buffers and attributes in one module, as they were when this was made."""

    def __init__(self, module: nn.Module) -> None:
        self.devices = {each.device for each in module.parameters() if each.device.type == "cuda"}
        self._random = torch.random.get_rng_state()
        self._random_on = {device: torch.cuda.get_rng_state(device) for device in self.devices}
        self._buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        self._attributes = {inner: dict(inner.__dict__) for inner in module.modules()}

    def undo(self) -> None:
        """Put them back, but for compile slots and attributes that are new."""
        self.put_random_state_back()
        for module, attributes in self._attributes.items():
            for name, value in attributes.items():
                if name not in SLOTS and module.__dict__.get(name) is not value:
                    module.__dict__[name] = value
        with torch.no_grad():
            for buffer, before in self._buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)

    def put_random_state_back(self) -> None:
        """Put the random state back."""
        torch.random.set_rng_state(self._random)
        for device, state in self._random_on.items():
            torch.cuda.set_rng_state(state, device)
