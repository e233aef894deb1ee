"""What one op takes on the GPU that is there, called on random values of the form that it will get.

Torch's own benchmarkers are not used: which one serves is a setting of Inductor's, only one of them returns medians,
and none runs a backward op in the thread that will run it, for which cuDNN would build its plans once more.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.capture import torch_distributed
from fxopt.capture.caching import source_digest
from fxopt.capture.joint_codes import is_ours
from fxopt.capture.torch_lowering import cache_folder
from fxopt.gpu_clock import GpuClock
from fxopt.graph.torch_private import unset_fake_temporarily
from fxopt.kernels.launcher import compiled_ahead, finish_compiling, run_as_backward
from fxopt.remat.cost import tensors_in
from fxopt.remat.measured import RANKS, ROOFLINES, Measured, Trial
from fxopt.remat.timings import Timing
from fxopt.timed_values import OwnTensors, call_of

log = logging.getLogger("fxopt")
CPU = torch.device("cpu")
LIMIT_S = 1.5
"""After so long no timing of one model begins, first calls left out: these compile what the first step would."""
ELSEWHERE = "it runs on another device"
NO_MEMORY = "there is not memory enough to time it"
NO_TIME = f"all timings together would take more than {LIMIT_S:g} s"
COPIED = 16 * 2**20
"""What operands of an op may come to that are made for it though the model has them, as scales of 4-bit weights."""


Tensors = Callable[[], Sequence[torch.Tensor]]
"""Gives the tensors of a model."""


def find_measured(place: torch.device, spare: int | None = None, owned: Tensors = tuple) -> Measured:
    """Return what is known, or can be timed, of ops on `place`; ranks of one group time nothing, lest plans differ.

    `spare` is what a step may hold beside what lives all the time, None where nothing limits it; `owned` gives the
    model's own tensors.
    """
    if place.type != "cuda":
        return ROOFLINES
    if torch_distributed.num_ranks() > 1:
        return Measured(without=RANKS)
    return Measured(
        OpTimer(place, spare=spare, owned=owned),
        cache_folder() / "fxopt" / f"timings-{environment_of(place)}.json",
    )


def environment_of(place: torch.device) -> str:
    """Return what timings depend on beside the op: the GPU, the code that runs on it, and torch's switches."""
    versions = (torch.cuda.get_device_name(place), torch.__version__, find_triton_version(), source_digest())
    switches = torch.backends.cuda.matmul.fp32_precision, torch.are_deterministic_algorithms_enabled()
    return hashlib.sha256(repr((versions, switches)).encode()).hexdigest()[:16]


def find_triton_version() -> str:
    """Return the version of Triton, "" where it is not installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


Clock = Callable[[Callable[[], Any]], "Timing | str"]
"""Says what a call takes that ran before, or why that cannot be seen."""


class OpTimer:
    """Times ops on `place`, as long as there is memory and time; the user's random state stays as it was."""

    def __init__(
        self,
        place: torch.device,
        clock: Callable[[torch.device], Clock] | None = None,
        room: Callable[[torch.device, int], int] | None = None,
        spare: int | None = None,
        owned: Tensors = tuple,
    ) -> None:
        self._place = place if place.type != "cuda" else torch.device("cuda", place.index or 0)
        self._make_clock, self._room = clock or GpuClock, room or find_room
        self._spare, self._owned = spare, owned
        self._left_s = LIMIT_S

    def __call__(self, trials: Sequence[Trial], in_step: int) -> list[Timing | str]:
        """Return of each trial what it takes, or why it was not timed; an op of the step needs `in_step` bytes.

        Of a step that may hold what it likes no op is too large: beside the largest one it holds what blocks save,
        which is more than the clock does where memory matters. Under a plan that has to spare memory its widest ops may
        run on a part of the tokens: it is not timed here what needs more than half of that, unless there is room.
        """
        allowed = in_step + GpuClock.BYTES + COPIED
        if self._spare is not None:
            allowed = min(allowed, max(in_step // 2, self._spare))
        places = [self._place.index or 0] if self._place.type == "cuda" else []
        with (
            unset_fake_temporarily(),
            torch.no_grad(),
            torch.autocast(self._place.type, enabled=False),
            torch.random.fork_rng(places),  # pyright: ignore[reportUnknownMemberType]
        ):
            room = self._room(self._place, allowed) - GpuClock.BYTES
            own = OwnTensors(self._owned(), self._place)
            found = [self._find_obstacle(trial, own, room) for trial in trials]
            fitting = [trial for trial, obstacle in zip(trials, found, strict=True) if not obstacle]
            if not fitting:
                return [*found]
            self._compile([trial for trial in fitting if is_ours(trial.node)], own)
            clock = self._make_clock(self._place)
            return [
                self._find_obstacle(trial, own, room) or self._time(trial, own, clock) for trial in trials
            ]

    def _find_obstacle(self, trial: Trial, own: OwnTensors, room: int) -> str:
        if trial.bytes - own.spared_by(trial) > room:
            return NO_MEMORY
        if not self._is_there(trial.node):
            return ELSEWHERE
        return "" if self._left_s > 0 else NO_TIME

    def _is_there(self, node: fx.Node) -> bool:
        """Return whether all that `node` reads lies on the place, but for single numbers."""
        sources = (tensors_in(source.meta.get("val")) for source in node.all_input_nodes)
        return all(
            value.device == self._place or (value.device == CPU and not value.dim())
            for value in itertools.chain.from_iterable(sources)
        )

    def _compile(self, trials: list[Trial], own: OwnTensors) -> None:
        """Compile side by side what `trials` will launch, and wait: while a thread compiles, launches are late."""
        with compiled_ahead(self._place) as is_needed:
            for trial in trials if is_needed else []:
                try:
                    call_of(trial, own)()
                except Exception as error:  # the timing meets it again
                    name = trial.node.target
                    log.debug("%s was not compiled ahead: %s: %s", name, type(error).__name__, error)
        finish_compiling()

    def _time(self, trial: Trial, own: OwnTensors, clock: Clock) -> Timing | str:
        found: list[Timing | str] = []
        try:
            call = call_of(trial, own)

            def run() -> None:
                call()  # it compiles what the first step would
                started = time.perf_counter()
                found.append(clock(call))
                self._left_s -= time.perf_counter() - started

            if trial.in_backward and self._place.type == "cuda":
                run_as_backward(run, self._place)
            else:
                run()
        except torch.OutOfMemoryError:
            return NO_MEMORY
        except Exception as error:  # an estimate is left, and the plan says so
            log.debug("%s was not timed: %s: %s", trial.node.target, type(error).__name__, error)
            return f"it does not run on random values ({type(error).__name__})"
        return found[0]


def find_room(place: torch.device, allowed: int) -> int:
    """Return how many bytes may be allocated now: what is free, and what never shows in torch's recorded peak.

    That peak is at least what is recorded already, and what a step may hold: `allowed` beside what is allocated now.
    """
    allocated = torch.cuda.memory_allocated(place)
    free = torch.cuda.mem_get_info(place)[0] + torch.cuda.memory_reserved(place) - allocated
    return min(free, max(torch.cuda.max_memory_allocated(place) - allocated, allowed))
