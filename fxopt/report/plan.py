"""A plan as plain data: what each block keeps for backward, where, what it computes again, and what that costs.

A plan holds no tensors and no code: it is printed, written as JSON, read again and given back to `fxopt.optimize`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from fxopt.errors import FxoptError

FORMAT = 6
SHARES = 16
"""Of a value kept in part, rows are kept by sixteenths: a plan holds for other lengths too."""
PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "int | None": (int, type(None)),
}
"""What the fields of records may hold, by how they are declared."""


@dataclasses.dataclass(frozen=True)
class Residual:
    """One value of a block that the backward pass needs.

    `op` names what computes it and its number among the block's calls of that op: "/again" behind it where that is an
    op of its own in backward, "/rows" where it is some rows of that value. `bytes` is what saving it keeps alive,
    `recompute_ms` what computing it again takes, `location` the line of the model's source. `shared` is an input that
    all blocks read: it lives once.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    recompute_ms: float
    location: str = ""
    shared: bool = False


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the blocks of one form do: which residuals are saved, which computed again, which offloaded to the host.

    `saved_bytes` stay on the device between forward and backward, `offloaded_bytes` on the host; `forward_bytes` and
    `backward_bytes` are the most that lives at an instant of the block's own run, `gradient_bytes` the gradients of
    its parameters. `recompute_ms` comes on top of `compute_ms`, forward and backward, and so does `wait_ms` where
    transfers take longer than what runs meanwhile. In `chunks` of its tokens, one after the other, runs the part of the
    block with the widest values, which takes `chunk_ms` more. Of the value `part_of`, so many `sixteenths` of its rows
    are among what is saved or offloaded, and the others are computed again. Of all these `measured_ms` are of
    ops that were timed on the device.
    """

    saved: tuple[Residual, ...]
    recomputed: tuple[Residual, ...]
    saved_bytes: int
    forward_bytes: int
    backward_bytes: int
    gradient_bytes: int
    compute_ms: float
    recompute_ms: float
    offloaded: tuple[Residual, ...] = ()
    offloaded_bytes: int = 0
    wait_ms: float = 0.0
    chunks: int = 1
    chunk_ms: float = 0.0
    part_of: str = ""
    sixteenths: int = 0
    measured_ms: float = 0.0

    @property
    def extra_ms(self) -> float:
        """What this decision takes on top of the block's own work."""
        return self.recompute_ms + self.wait_ms + self.chunk_ms


@dataclasses.dataclass(frozen=True)
class Instant:
    """One instant of a training step, and the bytes that live then.

    Of these `saved_bytes` are what blocks that are not running have saved for backward, `moving_bytes` are on their
    way to the host or kept for what comes back, `gradient_bytes` are gradients of parameters, `running_bytes` what the
    running block (its own residuals among it) or the optimizer works on; the rest lives all the time, or, as masks that
    all blocks read, from before the blocks until backward is done.
    """

    name: str
    bytes: int
    saved_bytes: int = 0
    moving_bytes: int = 0
    gradient_bytes: int = 0
    running_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which decision each block carries out, and the peak and time that follow.

    `budget` is what was asked for, `limit_bytes` what it came to (None: no limit). `layers` gives each block, by its
    path, the number of its decision. `static_bytes` live all the time: weights, buffers, the optimizer's state.
    `smallest_bytes` is the lowest peak that any plan reaches. `after` are the pieces that follow the blocks, which are
    not planned; `update_ms` of `step_ms` are the optimizer's, and for `idle_ms` a GPU waits for launches; `timeline` is
    the simulated step. `residual_bytes` stay on the device, `host_bytes` on the host. `measured_ms` of `step_ms` are of
    ops that were timed on the device, the rest are estimates; of these, `rooflines` are ops that are timed elsewhere,
    with the reasons.
    """

    model: str
    device: str
    lowering: str
    budget: str
    limit_bytes: int | None
    tokens: int
    decisions: tuple[Decision, ...]
    layers: tuple[tuple[str, int], ...]
    static_bytes: int
    smallest_bytes: int
    peak_bytes: int
    peak_at: str
    step_ms: float
    recompute_ms: float
    wait_ms: float = 0.0
    update_ms: float = 0.0
    idle_ms: float = 0.0
    measured_ms: float = 0.0
    rooflines: tuple[str, ...] = ()
    after: tuple[Decision, ...] = ()
    timeline: tuple[Instant, ...] = ()

    @property
    def residual_bytes(self) -> int:
        """What one forward keeps on the device: of the blocks, what they share once, and of what follows."""
        decisions = [self.decisions[number] for _, number in self.layers] + list(self.after)
        residuals = [residual for decision in decisions for residual in decision.saved]
        shared = {residual.op: residual.bytes for residual in residuals if residual.shared}
        return sum(residual.bytes for residual in residuals if not residual.shared) + sum(shared.values())

    @property
    def measured_share(self) -> float:
        """How much of the time that the device works rests on ops that were timed on it."""
        busy_ms = self.step_ms - self.idle_ms - self.wait_ms
        return self.measured_ms / busy_ms if busy_ms else 0.0

    @property
    def host_bytes(self) -> int:
        """What one forward keeps on the host."""
        return sum(self.decisions[number].offloaded_bytes for _, number in self.layers)

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that `to_json` wrote.

        Raises:
            FxoptError: not such a text.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            found = data.pop("format", None)
            if found != FORMAT:
                raise FxoptError(
                    f"plan: expected format {FORMAT} of a plan, got {found!r}\nmake it anew with fxopt.plan"
                )
            return _made(cls, data)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise FxoptError(
                f"plan: expected the JSON text of a plan, got {text!r:.40} ({type(error).__name__}: {error})\n"
                "Plan.to_json() writes one"
            ) from error

    def __str__(self) -> str:
        """Return the plan as a table."""
        from fxopt.report.plan_table import render_plan

        return render_plan(self)


def _made(cls: type[Plan], data: dict[str, Any]) -> Plan:
    decisions = tuple(map(_decision, data.pop("decisions")))
    after = tuple(map(_decision, data.pop("after")))
    layers = tuple((str(path), int(number)) for path, number in data.pop("layers"))
    unknown = next((number for _, number in layers if not 0 <= number < len(decisions)), None)
    if unknown is not None:
        raise ValueError(f"decision {unknown} of {len(decisions)}")
    rooflines: list[Any] = data.pop("rooflines")
    if type(rooflines) is not list:
        raise TypeError(f"rooflines is {rooflines!r}")
    timeline = tuple(Instant(**instant) for instant in data.pop("timeline"))
    made = cls(
        **data,
        decisions=decisions,
        layers=layers,
        after=after,
        rooflines=tuple(map(str, rooflines)),
        timeline=timeline,
    )
    for plain in (made, *decisions, *after, *timeline):
        _check_types(plain)
    return made


def _check_types(value: Plan | Decision | Instant) -> None:
    """Raise TypeError where a number or a text of `value` is something else."""
    for field in dataclasses.fields(value):
        found, wanted = getattr(value, field.name), PLAIN.get(str(field.type))
        if wanted is not None and (isinstance(found, bool) or not isinstance(found, wanted)):
            raise TypeError(f"{field.name} is {found!r}")


def _decision(data: dict[str, Any]) -> Decision:
    saved, recomputed, offloaded = (
        tuple(map(_residual, data.pop(name))) for name in ("saved", "recomputed", "offloaded")
    )
    return Decision(**data, saved=saved, recomputed=recomputed, offloaded=offloaded)


def _residual(data: dict[str, Any]) -> Residual:
    shape: tuple[int, ...] = tuple(data.pop("shape"))
    return Residual(**data, shape=shape)
