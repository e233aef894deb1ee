"""What a block may leave to the host between forward and backward, and how long it then waits for transfers.

Values leave while the next block runs forward, and come back while that block runs backward: what takes longer than
these do is waited for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from fxopt.remat.cost import PICOSECONDS
from fxopt.remat.devices import LINK_SHARE
from fxopt.remat.joint import Joint
from fxopt.remat.menu import Choice, find_steps

HOST_PS = 3_000_000_000
"""What the host takes for both passes of a block that is replayed and sends values off."""
SMALLEST = 1 << 14
"""Values of fewer bytes stay on the device: a transfer's own cost is that of some hundred kilobytes."""


def add_offloads(joint: Joint, choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """Return `choices` and their offloading forms that are worth a look, the fastest first.

    These are the forms on the lower hull of all, and of each choice the one that leaves most: what is on its way lives
    beside the neighbouring block, so of two forms that keep the same, the one that moves less may need less. What lies
    between two choices has forms as well: it may move what can be hidden, where the first moves less than it saves.
    """
    between = find_steps(joint.dag, choices)
    offloading = [form for choice in (*choices, *between) for form in _forms(joint, choice)]
    hull = _lower_hull({_point(joint, choice): choice for choice in reversed([*choices, *offloading])})
    found = [*choices, *(choice for choice in hull if choice.offloaded)]
    for choice in choices:
        whole = max(_forms(joint, choice), key=lambda form: len(form.offloaded), default=choice)
        if not any(_is_beaten(joint, whole, other) for other in found):
            found.append(whole)
    return tuple(sorted(found, key=lambda choice: (_point(joint, choice)[1], len(choice.offloaded))))


def hides_host(joint: Joint) -> bool:
    """Return whether a block runs longer than the host takes for it, as it must where values may leave it."""
    return joint.compute_cost >= HOST_PS


def wait_of(joint: Joint, choice: Choice) -> int:
    """Return the picoseconds of transfers, both ways, that no other work hides.

    The blocks next to this one are taken to be like it.
    """
    if not choice.offloaded:
        return 0
    transfer = _transfer_cost(joint, choice.offloaded)
    backward = joint.compute_cost - joint.forward_cost + choice.cost
    return max(0, transfer - joint.forward_cost) + max(0, transfer - backward)


def spare_for(joint: Joint, choice: Choice, place: int, shares: int) -> int:
    """Return how many of so many equal shares of a value, that is computed again, could leave too and nobody waits.

    What leaves is not computed again, so there is less to hide it behind.
    """
    value = joint.dag.values[place]
    transfer = _transfer_cost(joint, choice.offloaded)
    backward = joint.compute_cost - joint.forward_cost + choice.cost
    moved = (value.bytes or 0) / (joint.device.link * LINK_SHARE) * PICOSECONDS
    most = (joint.forward_cost - transfer) / moved, (backward - transfer) / (moved + (value.cost or 0))
    return max(0, min(shares - 1, int(min(most) * shares)))


def _transfer_cost(joint: Joint, places: frozenset[int]) -> int:
    rate = joint.device.link * LINK_SHARE
    return int(joint.dag.bytes_of(places) / rate * PICOSECONDS) + joint.device.launch_ps * len(places)


def _point(joint: Joint, choice: Choice) -> tuple[int, int]:
    return choice.bytes, choice.cost + wait_of(joint, choice)


def _is_beaten(joint: Joint, choice: Choice, other: Choice) -> bool:
    """Return whether `other` is as good as `choice` in what it keeps, takes and moves."""
    mine, others = ((*_point(joint, each), joint.dag.bytes_of(each.offloaded)) for each in (choice, other))
    return all(b <= a for a, b in zip(mine, others, strict=True))


def _forms(joint: Joint, choice: Choice) -> Iterator[Choice]:
    """Yield `choice` with the largest of its values offloaded, one more each time, and with what can be hidden."""
    movable = sorted(
        (place for place in choice.saved if _is_movable(joint, place)),
        key=lambda place: (-(joint.dag.values[place].bytes or 0), place),
    )
    hidden: list[int] = []
    for number, place in enumerate(movable, 1):
        yield _offloading(joint, choice, frozenset(movable[:number]))
        if not wait_of(joint, _offloading(joint, choice, frozenset((*hidden, place)))):
            hidden.append(place)
    if hidden:
        yield _offloading(joint, choice, frozenset(hidden))


def _offloading(joint: Joint, choice: Choice, places: frozenset[int]) -> Choice:
    left = joint.dag.bytes_of(choice.saved - places)
    return dataclasses.replace(choice, bytes=left, offloaded=places)


def _is_movable(joint: Joint, place: int) -> bool:
    """Return whether a saved value lives for this block's backward alone: it is no result that others read on."""
    results = {storage for node in joint.results for storage in joint.storages[node]}
    own = joint.storages[joint.forward[place]]
    return (joint.dag.values[place].bytes or 0) >= SMALLEST and results.isdisjoint(own)


def _lower_hull(found: dict[tuple[int, int], Choice]) -> list[Choice]:
    """Return the choices whose points lie on the lower hull of time over bytes."""
    hull: list[tuple[int, int]] = []
    for point in sorted(found):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return [found[point] for point in hull]


def _is_above(left: tuple[int, int], middle: tuple[int, int], right: tuple[int, int]) -> bool:
    """Return whether `middle` lies on or above the line from `left` to `right`."""
    rise = (right[1] - left[1]) * (middle[0] - left[0])
    return (middle[1] - left[1]) * (right[0] - left[0]) >= rise
