"""An installation as options ask for it: with the lowering they name, a planner and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from fxopt.capture.installation import Installation, Transform
from fxopt.capture.lowering import choose_lowering, name_of
from fxopt.capture.torch_lowering import plain_backend
from fxopt.options import Options
from fxopt.planning import make_planner


def new_installation(
    model: nn.Module, options: Options, transform: Transform, lower: Callable[..., Any] | None = None
) -> Installation:
    """Return what `install()` puts into `model`: graphs go through `transform`, then `lower`, else as options say."""

    def lower_graph(
        gm: fx.GraphModule, example_inputs: list[Any], mark: Any = None, *, graphed: bool = False
    ) -> Callable[..., Any]:
        lowering, reason = choose_lowering(options.lowering, gm)
        if reason:
            installation.ledger.note(reason)
        compiled = lowering(gm, example_inputs, mark, graphed=graphed)
        replayed = ", replayed as CUDA graphs" if graphed and lowering is not plain_backend else ""
        installation.ledger.lowerings.setdefault(name_of(lowering) + replayed)
        return compiled

    installation = Installation(
        model,
        options,
        transform,
        lower or lower_graph,
        partial=options.partial,
        planner=None if lower else make_planner(model, options),
        replayed=lower is None and options.cuda_graphs == "auto",
    )
    return installation
