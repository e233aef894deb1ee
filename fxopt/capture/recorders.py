"""What transformers collects on the way (router logits, hidden states), kept whole where blocks are compiled.

A model that is asked for such an output runs under a *collector*, a dictionary of lists to which hooks on its modules
append. Where a block is compiled, what its inner hooks would append leaves the graph as further outputs, and is
appended outside. Where the model around is captured, its blocks are leaves that no hook can look into: such a leaf
returns what the collector gets during its call as well, and code that Dynamo traces appends it there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fxopt.capture import torch_dynamo, torch_modules
from fxopt.capture.reasons import frames_told

Counts = tuple[tuple[str, Any], ...]
"""By key of a collector: how many values it holds, or which numbers are wanted, where the list says that."""
Added = tuple[tuple[str, int], ...]
"""By key of a collector: how many values a block's call adds."""
Noted = list[tuple[int, Any]]
"""What hooks note while a block runs compiled: the number of the recorder, and the value."""


def _library() -> types.ModuleType | None:
    try:
        from transformers.utils import output_capturing
    except ImportError:
        return None
    return output_capturing


@dataclasses.dataclass(frozen=True)
class Recorder:
    """A hook on `module` that appends its output, or the item `index` of it, under `key`."""

    module: Any
    key: str
    index: int

    @property
    def is_wanted(self) -> bool:
        """Whether the call that runs now collects what this is for."""
        collected = active()
        return collected is not None and self.key in collected

    @property
    def is_plain(self) -> bool:
        """Whether what is appended hangs on the module's output alone; of hidden states, the first input is too."""
        return self.key != "hidden_states"

    def deliver(self, value: Any) -> None:
        """Append `value` where the hook would."""
        collected = active()
        if collected is not None and self.key in collected:
            collected[self.key].append(value)


def active() -> dict[str, Any] | None:
    """Return the collector of the call that runs now, or None."""
    library = _library()
    return None if library is None else library._active_collector.get()


def recorder_of(module: Any, hook: Any) -> Recorder | None:
    """Return `hook` of `module` (None where that is of no concern) as a recorder, or None: it is somebody else's."""
    library = _library()
    code = getattr(hook, "__code__", None)
    if library is None or code is None or code.co_filename != library.__file__:
        return None
    cells = getattr(hook, "__closure__", None) or ()
    names = dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=False))
    if "key" not in names or "index" not in names:
        return None
    return Recorder(module, names["key"], names["index"])


@contextlib.contextmanager
def collecting(collected: dict[str, Any]) -> Iterator[None]:
    """Collect into `collected` within the scope, whatever was collected around it."""
    library = _library()
    if library is None:
        yield
        return
    variable = library._active_collector
    previous = vars(variable).copy()
    token = variable.set(collected)
    try:
        yield
    finally:
        variable.reset(token)
        vars(variable).update(previous)  # under Dynamo `reset` forgets what was there


def install_recorders(modules: Iterable[nn.Module]) -> None:
    """Install transformers' hooks on those of `modules` that collect outputs, as their first such call would.

    Doing so takes a lock, which Dynamo does not capture.
    """
    library = _library()
    if library is None:
        return
    for module in modules:
        function: Any = torch_modules.forward_of(type(module))
        while function is not None:
            if getattr(getattr(function, "__code__", None), "co_filename", "") == library.__file__:
                library.maybe_install_capturing_hooks(module)
            function = getattr(function, "__wrapped__", None)


def find_asked(modules: Iterable[nn.Module], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Return the names by which this call or a config asks for outputs that are collected.

    transformers' models say in `_can_record_outputs` what can be collected; `output_<key>` asks for it.
    """
    found: set[str] = set()
    for module in modules:
        names = {f"output_{key}" for key in getattr(module, "_can_record_outputs", None) or ()}
        if not names:
            continue
        asked = {**getattr(getattr(module, "config", None), "__dict__", {}), **kwargs}
        found.update(name for name in names if asked.get(name))
    return tuple(sorted(found))


def may_collect(modules: Iterable[nn.Module], kwargs: dict[str, Any]) -> bool:
    """Return whether outputs may be collected in this call: asked for, or by a model that asked its parts before."""
    modules = tuple(modules)
    is_hooked = any(getattr(module, "_output_capturing_hooks_installed", False) for module in modules)
    return is_hooked or bool(find_asked(modules, kwargs))


def is_of_recorders(error: BaseException) -> bool:
    """Return whether Dynamo stopped at the lock under which transformers installs its hooks."""
    library = _library()
    return library is not None and any(path == library.__file__ for path, _ in frames_told(error))


class Notes:
    """The hooks that note a block's recorded outputs while it runs compiled; equal blocks have the same ones."""

    def __init__(self) -> None:
        self.noted: Noted = []
        self._hooks: dict[tuple[int, int], Callable[..., None]] = {}

    @contextlib.contextmanager
    def placed(self, recorders: Sequence[Recorder]) -> Iterator[None]:
        """Put a hook that notes on the module of each recorder within the scope; their own are to be hidden."""
        self.noted.clear()
        placed: list[tuple[dict[int, Any], int]] = []
        for place, recorder in enumerate(recorders):
            hooks: dict[int, Any] = getattr(recorder.module, torch_modules.FORWARD_HOOK_DICTS[1])
            hooks[-1 - place] = self._find(place, recorder.index)
            placed.append((hooks, -1 - place))
        try:
            yield
        finally:
            for hooks, key in placed:
                hooks.pop(key, None)
            self.noted.clear()

    def _find(self, place: int, index: int) -> Callable[..., None]:
        """Return the hook for a place; Dynamo takes another function for another block's."""
        if (place, index) not in self._hooks:
            noted = self.noted

            def note(module: nn.Module, args: Any, output: Any) -> None:
                value = output[index] if isinstance(output, tuple) else output
                if value is not None:
                    noted.append((place, value))

            self._hooks[place, index] = note
        return self._hooks[place, index]


def collect_outputs(leaf: Callable[..., Any]) -> Callable[..., Any]:
    """Return the `leaf` of a block so that, while Dynamo traces, what is collected inside it is collected."""
    library = _library()
    if library is None:
        return leaf
    variable = library._active_collector
    form: list[Any] = [None, ()]

    def run_flat(counts: Counts, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        output, added = run_collecting(leaf, counts, args, kwargs)
        form[:] = [len(output) if isinstance(output, tuple) else None, num_values_of(added)]
        return flatten(output, added)

    run_flat.fxopt_leaf = True  # pyright: ignore[reportFunctionMemberAccess]
    run_flat.fxopt_flat = True  # pyright: ignore[reportFunctionMemberAccess]
    flat_leaf = torch_dynamo.mark_leaf(run_flat)

    @torch.compiler.assume_constant_result
    def find_form() -> tuple[int | None, Added]:
        return form[0], form[1]

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling() or not variable.compiling:
            return leaf(*args, **kwargs)
        collected = variable.get()
        if not collected:
            return leaf(*args, **kwargs)
        flat = flat_leaf(count_collected(collected), *args, **kwargs)
        number, added = find_form()
        place = 1 if number is None else number
        for key, num_added in added:
            for value in flat[place : place + num_added]:
                collected[key].append(value)
            place += num_added
        return flat[0] if number is None else tuple(flat[:number])

    return call


def run_collecting(
    run: Callable[..., Any], counts: Counts, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, list[Any]]]:
    """Return what `run` returns, and by key what a collector that held as much as `counts` says got meanwhile."""
    collected = as_collector(counts)
    with collecting(collected):
        output = run(*args, **kwargs)
    return output, find_added(counts, collected)


def find_added(counts: Counts, collected: dict[str, Any]) -> dict[str, list[Any]]:
    """Return by key what `collected` has got since `counts`."""
    return {key: collected[key][count:] for key, count in counts if isinstance(count, int)}


def flatten(output: Any, added: dict[str, list[Any]]) -> tuple[Any, ...]:
    """Return a block's outputs and what was collected in one tuple."""
    outputs = output if isinstance(output, tuple) else (output,)
    return (*outputs, *itertools.chain.from_iterable(added.values()))


def num_values_of(added: dict[str, list[Any]]) -> Added:
    """Return by key how many values there are."""
    return tuple((key, len(values)) for key, values in added.items())


def count_collected(collected: dict[str, Any]) -> Counts:
    """Return how many values a collector holds by key; Dynamo traces this too."""
    counts: list[tuple[str, Any]] = []
    for key, values in collected.items():
        wanted = [value for value in values if isinstance(value, int)]
        counts.append((key, tuple(sorted(wanted)) if wanted else len(values)))
    return tuple(counts)


def as_collector(counts: Counts) -> dict[str, Any]:
    """Return a collector that holds as many values as `counts` says."""
    return {key: [None] * count if isinstance(count, int) else set(count) for key, count in counts}
