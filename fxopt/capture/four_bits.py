"""Four-bit layers of bitsandbytes under an engine that gathers weights.

What is gathered is a plain tensor of codes: how these are read is lost with the weight's class. The layer's
forward puts both back on each call, by a change of its own attributes that Dynamo does not follow; done before,
there is nothing to change.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

LAYERS = "bitsandbytes.nn.modules"


class FourBitLayers:
    """The four-bit layers in one block, empty where there are none."""

    def __init__(self, block: nn.Module) -> None:
        self._library: Any = sys.modules.get(LAYERS)
        kinds = () if self._library is None else (self._library.Linear4bit, self._library.Embedding4bit)
        self._layers = [module for module in block.modules() if isinstance(module, kinds)]

    def restore(self) -> None:
        """Give the weights that were gathered plain what the layers keep of how they are read."""
        for layer in self._layers:
            if not isinstance(layer.weight, self._library.Params4bit):
                self._library.fix_4bit_weight_quant_state_from_module(layer)

    def restore_in(self, block: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Give stand-ins for weights of `block`, by their names, what the layers keep of how they are read."""
        paths = {module: path for path, module in block.named_modules()}
        for layer in self._layers:
            stand_in: Any = state.get(".".join(filter(None, (paths[layer], "weight"))))
            kept = getattr(layer, "quant_state", None)
            if stand_in is not None and kept is not None and getattr(stand_in, "quant_state", None) is None:
                stand_in.quant_state = kept
