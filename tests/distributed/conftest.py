"""Groups of processes that run the cases of `worker.py`: over NCCL where each has a GPU of its own, else over gloo.

    python -m pytest -v -s -m "gpu and not slow" tests/distributed

runs them on a machine with GPUs, and shows each case as it ends; those that need more processes than it has GPUs run
on its CPU. Groups of four share a CPU slowly: their tests are slow ones wherever the four have no GPU each.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).parent / "worker.py"
ROOT = WORKER.parents[2]
PATIENCE = {"cpu": 240, "cuda": 120}
"""Seconds a case may take before its processes are ended: a hang is a failure, and not the suite's."""
GRACE = 20
"""Seconds in which the other ranks answer after one has met an error; they may wait for it in a collective."""
TIMEOUT = {"cpu": 120, "cuda": 90}
"""Seconds that a collective waits for a rank."""

NEEDED = {"two": 2, "new_world": 2, "four": 4, "command": 2, "zero_world": 2, "zero_four": 4}
"""GPUs that a test needs to run over NCCL, by what it asks for."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of DeepSpeed, as a GPU's those whose processes will have one each, as slow those of four without.

    Those of as many processes go to one worker of pytest, which starts them once.
    """
    gpus = torch.cuda.device_count()
    for item in items:
        if "deepspeeds" in getattr(item, "fixturenames", ()):
            item.add_marker("deepspeed")
        needed = [size for name, size in NEEDED.items() if name in getattr(item, "fixturenames", ())]
        if item.path.parent != WORKER.parent or not needed:
            continue
        if {"two", "four", "zero_world", "zero_four"} & set(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group(f"{max(needed)} processes"))
        if max(needed) <= gpus:
            item.add_marker("gpu")
        elif max(needed) > 2:
            item.add_marker("slow")


class World:
    """`size` processes of one group, each answering the same cases."""

    def __init__(self, size: int, timeout: int | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.size = size
        self.on_gpu = torch.cuda.device_count() >= size
        self.device = "cuda" if self.on_gpu else "cpu"
        own = {
            "FXOPT_TEST_DEVICE": "cuda",
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // (2 * size))),
        }
        if not self.on_gpu:
            own = {"FXOPT_TEST_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        self.processes: list[subprocess.Popen[str]] = []
        for rank in range(size):
            environment = {
                **os.environ,
                **own,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "FXOPT_TEST_TIMEOUT": str(timeout or TIMEOUT[self.device]),
                "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            }
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(WORKER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
        assert self._answers(tuple(range(size))) == ["ready"] * size

    def start(self, case: str, **arguments: Any) -> None:
        """Give all ranks the same case."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps([case, arguments]) + "\n")
            process.stdin.flush()

    def run(self, case: str, **arguments: Any) -> list[dict[str, Any]]:
        """Return each rank's answer to a case, shown where pytest shows output; an error in one of them fails."""
        begin = time.monotonic()
        self.start(case, **arguments)
        answers = self.answers_of(range(self.size))
        errors = {rank: answer["error"] for rank, answer in enumerate(answers) if "error" in answer}
        if len(errors) not in (0, self.size):
            self.end()  # ranks that went on may be a collective ahead of the others
        found = [answer["errors"] for answer in answers if "errors" in answer]
        seconds = f"{time.monotonic() - begin:.1f} s on {self.size} x {self.device}"
        print(f"\n  {case} {arguments}: {seconds}", *found, sep="\n    ", flush=True)
        assert not errors, "\n".join(f"rank {rank}: {error}" for rank, error in errors.items())
        return answers

    def wait_for_end(self, rank: int) -> int:
        """Return the exit status of `rank`, which is to end by itself."""
        return self.processes[rank].wait(PATIENCE[self.device])

    def answers_of(self, ranks: Iterable[int]) -> list[dict[str, Any]]:
        """Return the answers of `ranks` to what all were given."""
        return [json.loads(answer) for answer in self._answers(tuple(ranks))]

    def _answers(self, ranks: tuple[int, ...]) -> list[str]:
        """Return one line of each of `ranks`; all processes are ended where one of these is silent or gone."""
        waiting = selectors.DefaultSelector()
        answers: dict[int, str] = {}
        for rank in ranks:
            process = self.processes[rank]
            waiting.register(process.stdout, selectors.EVENT_READ, rank)  # pyright: ignore[reportArgumentType]
        deadline = time.monotonic() + PATIENCE[self.device]
        while len(answers) < len(ranks):
            for key, _ in waiting.select(max(0.0, deadline - time.monotonic())):
                waiting.unregister(key.fileobj)
                answers[key.data] = key.fileobj.readline().strip()  # pyright: ignore
                if not answers[key.data] or is_error(answers[key.data]):
                    deadline = min(deadline, time.monotonic() + GRACE)
            silent = sorted(set(ranks) - set(answers))
            if silent and time.monotonic() >= deadline:
                self._show_stacks(silent)
                self._fail(answers, silent)
        if not all(answers.values()):
            self._fail(answers, [])
        return [answers[rank] for rank in ranks]

    def _show_stacks(self, ranks: list[int]) -> None:
        for rank in ranks:
            print(f"\nthe stacks of rank {rank}:", file=sys.stderr, flush=True)
            self.processes[rank].send_signal(signal.SIGUSR1)
            time.sleep(1)

    def _fail(self, answers: dict[int, str], silent: list[int]) -> None:
        """End the processes, and fail with what is known of each."""
        gone = sorted(rank for rank, answer in answers.items() if not answer)
        if gone:
            time.sleep(1)  # its output ends a moment before it does
        statuses = {rank: self.processes[rank].poll() for rank in gone}
        self.end()
        told = [f"rank {rank}: {answer}" for rank, answer in answers.items() if is_error(answer)]
        pytest.fail("\n".join([f"ranks {statuses} ended, ranks {silent} gave no answer in time", *told]))

    @property
    def is_alive(self) -> bool:
        """Whether all processes run."""
        return all(process.poll() is None for process in self.processes)

    def end(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("lock"):
            lock.unlink()  # a process killed while it builds leaves it, and the next would wait for it for ever


def is_error(answer: str) -> bool:
    """Return whether a rank's answer is the traceback of an error."""
    return answer.startswith('{"error"')


@pytest.fixture(scope="session", autouse=True)
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let processes build DeepSpeed's ops in a folder of this session, whose locks are known to be its own.

    What of theirs is in the folder that the environment names comes with its times, so that it is not built anew.
    """
    own = tmp_path_factory.mktemp("torch_extensions")
    with pytest.MonkeyPatch.context() as environment:
        if built := os.environ.get("TORCH_EXTENSIONS_DIR"):
            for folder in Path(built).glob("deepspeed_*"):
                shutil.copytree(folder, own / folder.name, ignore=shutil.ignore_patterns("lock"))
        environment.setenv("TORCH_EXTENSIONS_DIR", str(own))
        yield


@pytest.fixture(scope="session")
def worlds(extensions: None) -> Iterator[Callable[..., World]]:
    """Return a function that gives the group of a size and purpose, started once and again where a test ended it."""
    made: dict[tuple[int, str], World] = {}

    def find(size: int, purpose: str = "") -> World:
        key = size, purpose
        if key not in made or not made[key].is_alive:
            made[key] = World(size)
        return made[key]

    yield find
    for world in made.values():
        world.end()


@pytest.fixture
def two(worlds: Callable[[int], World]) -> World:
    """Two processes."""
    return worlds(2)


@pytest.fixture
def four(worlds: Callable[[int], World]) -> World:
    """Four processes."""
    return worlds(4)


@pytest.fixture(scope="session")
def deepspeeds(worlds: Callable[..., World]) -> Callable[[int], World]:
    """Return a function that gives processes of their own: DeepSpeed replaces functions of torch for good."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is at hand for `make test-deepspeed` alone")
    return lambda size: worlds(size, "deepspeed")


@pytest.fixture
def zero_world(deepspeeds: Callable[[int], World]) -> World:
    """Two processes for DeepSpeed's ZeRO."""
    return deepspeeds(2)


@pytest.fixture
def zero_four(deepspeeds: Callable[[int], World]) -> World:
    """Four processes for DeepSpeed's ZeRO."""
    return deepspeeds(4)


@pytest.fixture
def new_world() -> Iterator[Callable[..., World]]:
    """Return a function that starts a group of its own, ended with the test."""
    made: list[World] = []

    def make(size: int, **options: Any) -> World:
        made.append(World(size, **options))
        return made[-1]

    yield make
    for world in made:
        world.end()
