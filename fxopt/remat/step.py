"""A training step as the planner sees it: what lives at each of its instants, block by block."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

from fxopt.options import MOST_COPIED
from fxopt.report.plan import Decision, Instant, Residual

UPDATE = "optimizer"
"""What the instant of the optimizer's step is called."""


@dataclasses.dataclass(frozen=True)
class Around:
    """What surrounds the blocks, in bytes: what lives all the time, what follows the blocks, and the optimizer.

    `tail` are the pieces after the blocks in order; `gradient_bytes` are those of all parameters.
    `host_bytes` is how much may wait on the host. `whole_bytes` live until backward is done: what all blocks read, and
    parameters outside them that an engine gathers for a step; `reduced_bytes` are the buffers in which it reduces their
    gradients at its end. `tied_bytes` takes the gradient that a parameter used before the blocks gets last, where what
    follows them has given it one.
    """

    static_bytes: int
    tail: tuple[Decision, ...] = ()
    gradient_bytes: int = 0
    host_bytes: int = 0
    whole_bytes: int = 0
    reduced_bytes: int = 0
    tied_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Beside:
    """What an engine that shards parameters has in memory beside one region, in bytes.

    `forward` and `backward` are there while the region runs so. `moved_bytes` only while its parameters are gathered,
    `reduced_bytes` only while gradients are reduced, when all of the region's are there. `num_ranks` share what is
    left of a gradient; none of it is counted here where the engine `holds_gradients` in buffers that always live.
    """

    forward: int = 0
    backward: int = 0
    moved_bytes: int = 0
    reduced_bytes: int = 0
    num_ranks: int = 1
    holds_gradients: bool = False


NOTHING_BESIDE = Beside()


@dataclasses.dataclass(frozen=True)
class Spread:
    """What an engine that shards parameters adds to a step: beside each block, beside what follows, and else."""

    blocks: tuple[Beside, ...] = ()
    tail: Beside = NOTHING_BESIDE
    whole_bytes: int = 0
    reduced_bytes: int = 0

    def of(self, place: int) -> Beside:
        """Return what there is beside the block at `place`."""
        return self.blocks[place] if self.blocks else NOTHING_BESIDE


NOT_SPREAD = Spread()


def spread_decision(decision: Decision, beside: Beside) -> Decision:
    """Return `decision` for a region that an engine gathers parameters for and whose gradients it reduces."""
    if beside == NOTHING_BESIDE:
        return decision
    gathering = decision.saved_bytes + beside.moved_bytes
    reducing = decision.gradient_bytes + beside.reduced_bytes
    return dataclasses.replace(
        decision,
        forward_bytes=beside.forward + max(decision.forward_bytes, gathering),
        backward_bytes=beside.backward
        + max(decision.backward_bytes, decision.offloaded_bytes + max(gathering, reducing)),
        gradient_bytes=0 if beside.holds_gradients else decision.gradient_bytes // beside.num_ranks,
    )


def copy_shared(decision: Decision, num_blocks: int) -> Decision:
    """Return `decision` for a block that is replayed as a CUDA graph: it keeps copies of what other blocks read too.

    Tables of positions and masks are such inputs. A graph reads them where it read them when it was recorded. Where
    that were too much, `num_blocks` blocks are not replayed.
    """
    copied = sum(residual.bytes for residual in decision.saved if residual.shared)
    if copied * num_blocks > MOST_COPIED:
        return decision
    return dataclasses.replace(
        decision,
        saved_bytes=decision.saved_bytes + copied,
        forward_bytes=decision.forward_bytes + copied,
        backward_bytes=decision.backward_bytes + copied,
    )


def shared_bytes_of(kinds: Iterable[Sequence[Residual]]) -> int:
    """Return the bytes of what blocks of these kinds read beside each other, tables and masks.

    Inputs of one size and dtype that several kinds read are taken to be one tensor, those that one kind reads to be as
    many: which they are only shows when a step runs.
    """
    most: Counter[tuple[int, str]] = Counter()
    for kind in kinds:
        most |= Counter((each.bytes, each.dtype) for each in kind)
    return sum(count * size for (size, _), count in most.items())


def simulate_step(paths: Sequence[str], decisions: Sequence[Decision], around: Around) -> tuple[Instant, ...]:
    """Return the instants of one step: each block forward, what follows them, each block backward, the update.

    What a block offloads leaves while the next one runs, and comes back while that one runs backward, to memory that
    is kept for it from step to step.
    """
    instants: list[Instant] = []
    all_regions = [
        *zip(paths, decisions, strict=True),
        *((f"tail {i}" if len(around.tail) > 1 else "tail", d) for i, d in enumerate(around.tail)),
    ]
    saved = [0]
    leaving = [0, *(decision.offloaded_bytes for _, decision in all_regions)]
    landing = landing_bytes(decisions)

    def note(name: str, *parts: int) -> None:
        instants.append(Instant(name, around.static_bytes + around.whole_bytes + sum(parts), *parts))

    for number, (name, decision) in enumerate(all_regions):
        note(f"forward of {name}", saved[-1], landing + leaving[number], 0, decision.forward_bytes)
        saved.append(saved[-1] + decision.saved_bytes)
    gradients = 0
    for number in reversed(range(len(all_regions))):
        name, decision = all_regions[number]
        beside = landing - decision.offloaded_bytes  # its own values are among what it works on
        note(f"backward of {name}", saved[number], beside, gradients, decision.backward_bytes)
        gradients += decision.gradient_bytes
    if around.tied_bytes:
        note("backward of what stands before the blocks", 0, landing, gradients, around.tied_bytes)
    if around.reduced_bytes:
        note("reduction", 0, landing, gradients, around.reduced_bytes)
    update = around.static_bytes + landing + around.gradient_bytes
    instants.append(Instant(UPDATE, update, moving_bytes=landing, gradient_bytes=around.gradient_bytes))
    return tuple(instants)


def peak_bytes(decisions: Sequence[Decision], around: Around) -> int:
    """Return the most bytes of `simulate_step`, without naming its instants."""
    regions = (*decisions, *around.tail)
    landing = landing_bytes(decisions)
    held = around.static_bytes + around.whole_bytes + landing
    most = around.static_bytes + landing + around.gradient_bytes
    before: list[int] = []
    leaving = 0
    for decision in regions:
        before.append(held - decision.offloaded_bytes)
        most = max(most, held + leaving + decision.forward_bytes)
        held += decision.saved_bytes
        leaving = decision.offloaded_bytes
    gradients = 0
    for decision, held in zip(reversed(regions), reversed(before), strict=True):
        most = max(most, held + gradients + decision.backward_bytes)
        gradients += decision.gradient_bytes
    last = max(around.tied_bytes, around.reduced_bytes)
    return max(most, around.static_bytes + around.whole_bytes + landing + gradients + last) if last else most


def landing_bytes(decisions: Sequence[Decision]) -> int:
    """Return the memory that is kept for values of blocks that come back from the host.

    When a block's backward begins, the values of the one before it are asked for, and take the first place that is
    free, grown to their size; the block's own are read then, and leave theirs.
    """
    places = [0, 0]
    held: int | None = None
    for number in reversed(range(len(decisions))):
        size = decisions[number].offloaded_bytes
        if size and held is None:  # nobody asked for it ahead: it is the last one
            held = 0
            places[held] = max(places[held], size)
        before = decisions[number - 1].offloaded_bytes if number else 0
        held = int(held == 0) if before else None
        if held is not None:
            places[held] = max(places[held], before)
    return sum(places)


def find_peak(instants: Sequence[Instant]) -> Instant:
    """Return the instant at which most lives."""
    return max(instants, key=lambda instant: instant.bytes)
