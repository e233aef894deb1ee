"""Ranks that train one model together have to optimize it alike: they compare before the first step.

What is compared goes through the store of the process group, not through a collective: ranks that differ are told
so, each by the same error, and one that never comes is named when the store's own timeout has passed.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn

from fxopt.capture import torch_distributed, torch_dynamo, zero
from fxopt.capture.modules import tensors_of
from fxopt.capture.planning import Planner
from fxopt.errors import RanksDifferError
from fxopt.options import Options

SAME_OPTIONS = "call fxopt.optimize with the same arguments on every rank"
SAME_DEVICES = "put the model on devices of one type on every rank"
_ROUNDS: collections.Counter[str] = collections.Counter()
"""Comparisons made so far by each group of ranks; all its ranks count alike, and so find each other's keys."""


class Agreement:
    """The comparison of one optimized model across the ranks of its engine, made once."""

    def __init__(
        self, model: nn.Module, blocks: Iterable[nn.Module], options: Options, planner: Planner | None = None
    ) -> None:
        self._model, self._blocks = model, tuple(blocks)
        self._options, self._planner = options, planner
        self._is_made = False

    def check(self) -> None:
        """Compare with the other ranks, at the first training call under an engine; plan for the least that one has.

        Raises:
            RanksDifferError: the options differ, or a rank did not come.
        """
        if not self._is_made and dist.is_available() and dist.is_initialized():
            self._compare()

    @torch_dynamo.untraced
    def _compare(self) -> None:
        ranks = self._find_ranks()
        if not ranks:
            return
        self._is_made = True
        if len(ranks) > 1:
            limits = {} if self._planner is None else self._planner.limits
            least = compare(ranks, dist.get_rank(), describe(self._options, self._model), limits)
            if self._planner is not None:
                self._planner.agree(least)

    def _find_ranks(self) -> list[int]:
        """Return the ranks of the engine that runs the model right now; none where there is no engine."""
        engine = torch_distributed.active_ddp()
        if engine is not None:
            return dist.get_process_group_ranks(engine.process_group)
        for module in (self._model, *self._blocks):
            state = torch_distributed.fsdp_state_of(module)
            ranks = [] if state is None else torch_distributed.ranks_of(state)
            if ranks:
                return ranks
        group = zero.group_of(self._model)
        return [] if group is None else dist.get_process_group_ranks(group)


def describe(options: Options, model: nn.Module) -> dict[str, str]:
    """Return what ranks must have in common, by name."""
    return {
        "patterns": ", ".join(pattern.name for pattern in options.patterns),
        "disable": ", ".join(sorted(options.disable)) or "none",
        "lowering": options.lowering,
        "verify": options.verify,
        "strict": str(options.strict),
        "partial": str(options.partial),
        "cuda_graphs": options.cuda_graphs,
        "memory_budget": str(options.memory_budget),
        "max_host_memory": str(options.max_host_memory),
        "plan": "none"
        if options.plan is None
        else hashlib.sha256(repr(options.plan).encode()).hexdigest()[:12],
        "model": type(model).__name__,
        "devices": ", ".join(sorted({tensor.device.type for tensor in tensors_of(model)})) or "none",
    }


def compare(ranks: list[int], rank: int, mine: dict[str, str], limits: dict[str, int]) -> dict[str, int]:
    """Compare `mine` across `ranks`, and return the least of their `limits`: the first reads all and tells the others.

    Raises:
        RanksDifferError: on every rank, where two differ or one did not come.
    """
    name = ",".join(map(str, ranks))
    _ROUNDS[name] += 1
    store = torch_distributed.shared_store(f"fxopt/{name}/{_ROUNDS[name]}")
    store.set(str(rank), json.dumps([mine, limits]))
    if rank == ranks[0]:
        store.set("verdict", json.dumps(_judge(store, ranks)))
    verdict = _read(store, "verdict")
    text, least = (_absent(ranks[0], store), {}) if verdict is None else json.loads(verdict)
    if text:
        store.set(f"{rank} has read", "")
        if rank == ranks[0]:  # whose process may hold the store, and end with this error
            for other in ranks:
                if store.check([str(other)]):
                    _read(store, f"{other} has read")
        raise RanksDifferError(text)
    return least


def _judge(store: Any, ranks: list[int]) -> tuple[str, dict[str, int]]:
    """Return what is wrong between `ranks`, or "", and the least of their limits."""
    found: dict[int, dict[str, str]] = {}
    least: dict[str, int] = {}
    for rank in ranks:
        value = _read(store, str(rank))
        if value is None:
            return _absent(rank, store), {}
        found[rank], limits = json.loads(value)
        for name, limit in limits.items():
            least[name] = min(limit, least.get(name, limit))
    first = found[ranks[0]]
    for rank, other in found.items():
        names = [name for name in first if other.get(name) != first[name]]
        if names:
            got = "; ".join(
                f"{name} {first[name]!r} on rank {ranks[0]} and {other.get(name)!r} on rank {rank}"
                for name in names
            )
            cure = SAME_DEVICES if names == ["devices"] else SAME_OPTIONS
            text = f"options: ranks differ in {', '.join(names)}, expected the same on every rank, got {got}\n{cure}"
            return text, {}
    return "", least


def _absent(rank: int, store: Any) -> str:
    return (
        f"options: rank {rank} has not begun an optimized step, expected all ranks of the engine to, got none in "
        f"{store.timeout.total_seconds():.0f} s\ncall fxopt.optimize on every rank, and look for an error on that one"
    )


def _read(store: Any, key: str) -> str | None:
    """Return the value of `key` as soon as it is there, or None when the store's timeout has passed."""
    try:
        store.wait([key], store.timeout)
    except dist.DistStoreError:
        return None
    return store.get(key).decode()
