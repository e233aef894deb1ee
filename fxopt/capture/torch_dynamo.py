"""What is private of Dynamo: frames captured apart from each other, their guards, leaves, and where a graph breaks.

`tests/fxopt/capture/test_torch_dynamo.py` fails in plain words when a torch version moves one of these.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
import torch._dynamo as dynamo
from torch._C._dynamo import eval_frame
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew
from torch._dynamo.variables.dicts import ConstDictVariable
from torch._dynamo.variables.torch_function import TorchFunctionModeStackVariable

GIVEN = re.compile(r"L\['(args|kwargs)'\]\[[^\[\]]+\](\.data)?")
"""How Dynamo names a mapping among a captured block's arguments, and the dict inside a `UserDict`."""

_COPIES = itertools.count()
P = ParamSpec("P")
R = TypeVar("R")


def isolate(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of `function` with a code object and a code name of its own.

    Dynamo keeps its captures, and counts them against `recompile_limit`, per code object, and remembers
    which sizes were seen to change per file, line and name of the code: a copy per model keeps two models in
    one process apart in both (`isolate_recompiles`, from torch 2.13 on, does the first). The globals are a copy
    too: Dynamo puts what it compiled there, and a module's would keep it, and the model with it, for good.
    """
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{next(_COPIES)}"),
        dict(function.__globals__),
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def untraced(method: Callable[P, R]) -> Callable[P, R]:
    """Return `method` so that Dynamo runs it as it is: the user may have compiled what calls an optimized model."""
    disable: Any = dynamo.disable
    return disable(method)


def compile_frame(
    function: Callable[..., Any], backend: Callable[..., Any], *, fullgraph: bool
) -> Callable[..., Any]:
    """Return `function` under Dynamo with `backend`; a graph break is an error unless `fullgraph` is False.

    Dynamo never forgets a backend it was given, and through ours would never free a model: what it gets knows
    `backend` only as long as the function lives.
    """
    frame: Any = isolate(function)
    frame.fxopt_backend = backend
    alive = weakref.ref(frame)

    def call_backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        living: Any = alive()
        return living.fxopt_backend(gm, example_inputs)

    compiled: Any = torch.compile(frame, backend=call_backend, fullgraph=fullgraph)
    compiled.fxopt_code = frame.__code__
    return compiled


class FramesByForm:
    """One compiled frame of a function for each number of positional and set of keyword arguments it is called with.

    Each needs a capture of its own anyway. Asked why it captures anew, Dynamo looks in the call at hand for tensors
    that those before were given, and fails with a KeyError where there is none by that name.
    """

    def __init__(self, function: Callable[..., Any], backend: Callable[..., Any], *, fullgraph: bool) -> None:
        self._make = functools.partial(compile_frame, function, backend, fullgraph=fullgraph)
        self._frames: dict[tuple[int, frozenset[str]], Callable[..., Any]] = {}

    def frame_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """Return the frame for such a call, made where it is the first."""
        form = len(args), frozenset(kwargs)
        if form not in self._frames:
            self._frames[form] = self._make()
        return self._frames[form]

    def frames(self) -> tuple[Callable[..., Any], ...]:
        """Return the frames made so far."""
        return tuple(self._frames.values())

    def clear(self) -> None:
        """Forget all frames: the next calls are captured anew."""
        self._frames.clear()


GUARD = re.compile(r"\+- ([A-Z][A-Z_]+): (.+?)(?:\s{2,}# .*)?$")


def guards_of(compiled: Callable[..., Any]) -> tuple[str, ...]:
    """Return the conditions under which what `compile_frame` made runs its captures, each once, in Dynamo's words."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    code = getattr(compiled, "fxopt_code", None)
    entries = _debug_get_cache_entry_list(code) if code is not None else ()
    lines = (line for entry in entries for line in str(entry.guard_manager).splitlines())
    return tuple(dict.fromkeys(f"{found[1]}: {found[2]}" for line in lines if (found := GUARD.search(line))))


@contextlib.contextmanager
def frames_of_pieces_captured() -> Iterator[None]:
    """Let Dynamo capture the frames that a captured one calls within the scope.

    It leaves these alone inside whatever was captured whole, as the model around its blocks is.
    """
    switches: Any = eval_frame
    if hasattr(switches, "set_fullgraph_compiled_frame_count"):
        change, free = switches.set_fullgraph_compiled_frame_count, -1
    else:  # torch 2.11
        change, free = switches.set_eval_frame_override, switches._EvalFrameOverride.NONE
    previous = change(free)
    try:
        yield
    finally:
        change(previous)


def mark_leaf(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make Dynamo put a call of `function` into the graph as one node, without tracing into it."""
    dynamo.allow_in_graph(function)
    return function


def changes_python_state(but: object = None) -> bool:
    """Return whether the frame that Dynamo is compiling right now changes objects that were there before it.

    To be asked by a backend, while Dynamo calls it. `but` does not count, nor do mappings among its arguments: what is
    put into these is seen where the model is captured. Nor do modes, which `with` leaves as they were, nor empty
    mappings that are emptied.
    """
    effects = InstructionTranslator.current_tx().output.side_effects
    new = (AttributeMutationNew, ValueMutationNew)
    return any(
        not isinstance(item, TorchFunctionModeStackVariable)
        and not isinstance(item.mutation_type, new)
        and effects.is_modified(item)
        and not _is_given_mapping(item)
        and not _is_still_empty(item)
        for identity, item in effects.id_to_variable.items()
        if identity != id(but)
    )


def _is_given_mapping(item: Any) -> bool:
    if not isinstance(item, ConstDictVariable) or item.source is None:
        return False
    name = item.source.name() if callable(item.source.name) else item.source.name
    return GIVEN.fullmatch(name) is not None


def _is_still_empty(item: Any) -> bool:
    """Return whether a mapping was empty and is; Dynamo, which lets one be emptied that is not, then guards it."""
    if not isinstance(item, ConstDictVariable) or item.original_items or item.items or item.source is None:
        return False
    install_guard(item.source.make_guard(GuardBuilder.SEQUENCE_LENGTH))
    return True


def is_recorded() -> bool:
    """Return whether `torch.export` or `torch.jit.trace` is recording what runs right now.

    The flag is read and not `is_exporting()`, which Dynamo of torch 2.11 takes to be true wherever it traces.
    """
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def find_break(gm: torch.fx.GraphModule) -> tuple[str, list[str]] | None:
    """Return why `gm` ends before the frame it was captured from does, and the stack there, or None."""
    cause: Any = getattr(gm, "compile_subgraph_reason", None)
    if cause is None or not cause.graph_break:
        return None
    return cause.reason, [f'File "{frame.filename}", line {frame.lineno}' for frame in cause.user_stack]


def frames_passed_over() -> list[Any]:
    """Return what Dynamo notes of the last frames in this process that it could not capture, oldest first.

    Where it has reached its limit of captures, what it notes has no name (`co_name`): the frame is known no more.
    """
    noted: Any = dynamo.utils.get_compilation_metrics()
    return [frame for frame in noted if frame.fail_type is not None and frame.is_forward is not False]


def capture_again(error: BaseException, frames: list[Any]) -> list[Any]:
    """Let Dynamo capture those of `frames` that `error` came through another time; return the others.

    It passed them over since they could not be captured, and why they could not was that they fail.
    """
    codes = {_place_of(code): code for code in _codes_of(error)}
    failed = [codes.get(_place_of(frame)) for frame in frames]
    for code in failed:
        if code is not None:
            eval_frame.reset_code(code)
    return [frame for frame, code in zip(frames, failed, strict=True) if code is None]


def _place_of(item: Any) -> tuple[Any, ...]:
    return item.co_filename, item.co_firstlineno, item.co_name


def _codes_of(error: BaseException) -> Iterator[types.CodeType]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame.f_code
        traceback = traceback.tb_next


def num_unrecorded() -> int:
    """Return how many compiled graphs Inductor declined to record as CUDA graphs, in this process."""
    return dynamo.utils.counters["inductor"]["cudagraph_skips"]


SLOW_PATH = "Unable to hit fast path of CUDAGraphs"
"""How Inductor's warning begins that one compiled function runs again and again before any backward does."""


def expect_equal_blocks() -> None:
    """Have Inductor not warn of what is meant: equal blocks are one function, and all run before their backwards."""
    warnings.filterwarnings("ignore", message=SLOW_PATH, category=UserWarning)
