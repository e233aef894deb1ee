"""What is private of Dynamo's settings: the scope in which fxopt's calls are captured.

`tests/fxopt/capture/test_torch_settings.py` fails in plain words when a torch version moves one of these.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo import funcname_cache
from torch._logging._internal import log_state

from fxopt.graph.torch_private import quiet, quiet_fakes

RECOMPILE_LIMIT = 64
"""Captures one region of one model may have; Dynamo's own limit of 8 is met by a short training run."""

LOG_METHODS = ("debug", "info", "warning", "error", "log", "warning_once", "info_once", "warning_advice")
"""Methods of loggers, transformers' own among them; a log line breaks a capture, so under capture it says nothing."""
LOGGER_OF_FAILURES = "torch._dynamo.convert_frame"
"""Where Dynamo logs a traceback of each frame that it fails to capture and passes over."""


class FunctionSet(str):
    """A set of functions that is a text to JSON: torch before 2.13 writes its settings into a log, and fails
    with a traceback per capture where one is a `set` of functions."""

    functions: frozenset[Callable[..., Any]]

    def __new__(cls, functions: Iterable[Callable[..., Any]]) -> FunctionSet:
        """Return the set of `functions`."""
        members = frozenset(functions)
        made = super().__new__(cls, f"{len(members)} functions")
        made.functions = members
        return made

    def __contains__(self, item: object) -> bool:
        return item in self.functions

    def __iter__(self) -> Iterator[Any]:
        return iter(self.functions)


def make_capture_settings() -> dict[str, Any]:
    """Return Dynamo's settings for fxopt's calls: raised capture limits, and log lines passed over.

    Under DistributedDataParallel Dynamo would cut each graph at gradient buckets: blocks are small enough for the
    reductions to begin early, and cut, their patterns are lost. Under FSDP2 it would leave out guards on parameters
    and attributes, by which blocks that share a frame are told apart. It would collect garbage after each capture:
    `collecting.uncollected` keeps that out of them.
    """
    methods = {getattr(logging.Logger, name) for name in LOG_METHODS if hasattr(logging.Logger, name)}
    return {
        "recompile_limit": RECOMPILE_LIMIT,
        "accumulated_recompile_limit": RECOMPILE_LIMIT * 64,
        "optimize_ddp": False,
        "skip_fsdp_guards": False,
        "run_gc_after_compile": False,
        "ignore_logging_functions": FunctionSet(methods.union(dynamo_config.ignore_logging_functions)),
    }


FUNCTION_NAMES = funcname_cache.cache
"""What Dynamo keeps of the functions' names in each file; threads may enter and leave scopes in any order."""


class NoNames(dict[str, dict[int, str]]):
    """What stands in for that: no names, and no file has to be read for them."""

    def __contains__(self, filename: object) -> bool:
        return True

    def __missing__(self, filename: str) -> dict[int, str]:
        return {}


@contextlib.contextmanager
def capture_scope(settings: dict[str, Any]) -> Iterator[None]:
    """Put `settings` of Dynamo in force within the scope.

    Dynamo makes the head of a log line for each call that it puts into a graph, also where nobody reads the log, and
    tokenizes whole files for the functions' names in it: 0.7 s of a first step, which are spared. What fails under
    capture is told by a report or an error, not logged before.
    """
    with dynamo_config.patch(settings), quiet_fakes():
        if not is_artifact_logged("trace_call"):
            funcname_cache.cache = NoNames()
        try:
            yield
        finally:
            funcname_cache.cache = FUNCTION_NAMES


@contextlib.contextmanager
def failures_suppressed(are_suppressed: bool) -> Iterator[None]:
    """Let frames that Dynamo fails to capture, and that need not be, run as they are; or, within that, raise again.

    What is passed over so is told by a report.
    """
    silence = quiet(LOGGER_OF_FAILURES) if are_suppressed else contextlib.nullcontext()
    with silence, dynamo_config.patch(suppress_errors=are_suppressed):
        yield


def is_artifact_logged(name: str) -> bool:
    """Return whether `TORCH_LOGS` asks for what torch calls an artifact by this name."""
    return log_state.is_artifact_enabled(name)


def _named_parameters(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(module).named_parameters(module, *args, **kwargs)


def _named_buffers(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(module).named_buffers(module, *args, **kwargs)


@contextlib.contextmanager
def tensors_left_unlisted(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Keep Dynamo from listing the parameters and buffers below each of `modules` that it meets, within the scope.

    It does so for each module that holds the layers, for names and the addresses that CUDA graphs need: a fourth of
    what one more layer costs. It passes over a module whose methods are not `nn.Module`'s own; these do the same.
    """
    changed = [module for module in modules if "named_parameters" not in module.__dict__]
    for module in changed:
        module.__dict__["named_parameters"] = types.MethodType(_named_parameters, module)
        module.__dict__["named_buffers"] = types.MethodType(_named_buffers, module)
    try:
        yield
    finally:
        for module in changed:
            module.__dict__.pop("named_parameters", None)
            module.__dict__.pop("named_buffers", None)


def is_switched_off() -> bool:
    """Return whether Dynamo captures nothing in this process, by its settings or `TORCH_COMPILE_DISABLE`."""
    return bool(dynamo_config.disable)
