"""Which hooks a module really has at a call: Dynamo ignores hooks added after a capture, so we look each time."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from torch import nn

from fxopt.capture import torch_modules
from fxopt.capture.places import line_of, path_within, with_place
from fxopt.capture.recorders import Recorder, recorder_of
from fxopt.capture.torch_distributed import is_fsdp_hook
from fxopt.capture.zero import is_engine_hook, is_zero_hook


@dataclasses.dataclass(frozen=True)
class Hooks:
    """The hooks inside a module: the first module with one that would run, and whether others stand idle.

    `recorders` are those by which transformers collects outputs at this call; they count as neither. `gathers`: ZeRO-3
    gathers the parameters of modules by hooks, which count as neither too.
    """

    live: nn.Module | None
    idle: bool
    recorders: tuple[Recorder, ...] = ()
    gathers: bool = False


def has_hooks(module: nn.Module) -> bool:
    """Return whether `module` itself carries a hook that would run at this call."""
    if not torch_modules.carries_hooks(module):
        return False
    return any(map(_is_live, _hooks_of(module)))


def has_own_hooks(module: nn.Module) -> bool:
    """Return whether `module` itself carries a live hook other than those that gather and reduce its parameters."""
    if not torch_modules.carries_hooks(module):
        return False
    return any(_is_live(hook) and not is_gathering_hook(hook) for hook in _hooks_of(module))


def is_gathering_hook(hook: Any) -> bool:
    """Return whether `hook` is one by which an engine gathers and frees a module's parameters: FSDP2's or ZeRO-3's."""
    return is_fsdp_hook(hook) or is_engine_hook(hook)


def find_hooks(module: nn.Module) -> Hooks:
    """Return the hooks on the modules inside `module`, not on `module` itself."""
    live: nn.Module | None = None
    idle = gathers = False
    recorders: list[Recorder] = []
    stack = list(torch_modules.children_of(module).values())
    while stack:
        inner = stack.pop()
        if inner is None:
            continue
        if torch_modules.carries_hooks(inner):
            for hook in _hooks_of(inner):
                recorder = recorder_of(inner, hook)
                if not _is_live(hook):
                    idle = True
                elif is_zero_hook(hook):
                    gathers = True
                elif recorder is not None and recorder.is_plain:
                    recorders.append(recorder)
                elif live is None:
                    live = inner
        stack.extend(torch_modules.children_of(inner).values())
    return Hooks(live, idle, tuple(recorders) if live is None else (), gathers)


def _hooks_of(module: nn.Module) -> list[Any]:
    return [hook for name in torch_modules.HOOK_DICTS for hook in getattr(module, name).values()]


def place_of_hook(root: nn.Module, module: nn.Module) -> str:
    """Return the path from `root` of `module`, which carries a live hook, and where that hook is defined."""
    live = (hook for hook in _hooks_of(module) if _is_live(hook) and not is_gathering_hook(hook))
    line, path = next(map(line_of, live), ""), path_within(root, module)
    return f"{path} ({line})" if path and line else path or line


def hooked_inside(block: nn.Module, module: nn.Module) -> str:
    """Return why a model with a hook on `module`, a block or inside one, runs to its end as in stock."""
    reason = (
        f"a hook sits on a {type(module).__name__} of a block and may keep what the forward reads: the "
        "calls run stock around the compiled blocks"
    )
    return with_place(reason, place_of_hook(block, module))


class InnerHooks:
    """`find_hooks` of one module at each of its calls, at half the cost while there is none.

    What is kept is where the modules keep things, not what: a hook, a dictionary of hooks or a module that was put
    in since is seen.
    """

    _hooks_of: Callable[[Any], tuple[Any, ...]] = operator.itemgetter(*torch_modules.HOOK_DICTS)
    _children_of: Callable[[Any], Any] = operator.itemgetter(torch_modules.CHILDREN)

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._inner: list[nn.Module | None] = []
        self._outside = [module.__dict__]
        self._inside: list[dict[str, Any]] = []

    def find(self) -> Hooks:
        """Return the hooks on the modules inside, at this call."""
        holders = chain(self._outside, self._inside)
        if self._inner != list(chain.from_iterable(map(dict.values, map(self._children_of, holders)))):
            self._read()
        if not any(map(any, map(self._hooks_of, self._inside))):
            return Hooks(None, False)
        return find_hooks(self._module)

    def _read(self) -> None:
        """Note all modules inside, in the order in which `find` goes through their parents."""
        self._inner, self._inside = [], []
        queue: list[nn.Module] = [self._module]
        for parent in queue:
            for child in torch_modules.children_of(parent).values():
                self._inner.append(child)
                if child is not None:
                    queue.append(child)
                    self._inside.append(child.__dict__)


Hidden = list[tuple[nn.Module, str, Any]]
"""Hook dictionaries taken off modules: module, name of the dictionary, and it itself."""


def hide_hooks(modules: Iterable[nn.Module], which: Callable[[Any], bool] = lambda hook: True) -> Hidden:
    """Take the hooks for which `which` holds off `modules`, so that Dynamo sees none, and return where they were."""
    hidden: Hidden = []
    for module in modules:
        if not torch_modules.carries_hooks(module):
            continue
        for name in torch_modules.HOOK_DICTS:
            hooks = getattr(module, name)
            kept = {key: hook for key, hook in hooks.items() if not which(hook)}
            if len(kept) < len(hooks):
                hidden.append((module, name, hooks))
                module.__dict__[name] = type(hooks)(kept)
    return hidden


def show_hooks(hidden: Hidden) -> None:
    """Put back what `hide_hooks` has taken off."""
    for module, name, hooks in hidden:
        module.__dict__[name] = hooks


@contextlib.contextmanager
def hooks_hidden(modules: Iterable[nn.Module], which: Callable[[Any], bool]) -> Iterator[None]:
    """Hide the hooks of `modules` for which `which` holds within the scope."""
    hidden = hide_hooks(modules, which)
    try:
        yield
    finally:
        show_hooks(hidden)


def is_idle(hook: Any) -> bool:
    """Return whether `hook` does nothing at this call, so that Dynamo need not trace it.

    transformers leaves its output-capturing hooks on every layer after the first `output_hidden_states=True` call; they
    return at once unless a collector is active that wants their key.
    """
    return not _is_live(hook)


def is_not_recorder(hook: Any) -> bool:
    """Return whether `hook` is none by which transformers collects outputs."""
    return recorder_of(None, hook) is None


def is_users_hook(hook: Any) -> bool:
    """Return whether `hook` is neither transformers' nor an engine's: a user's, who expects the values of a call."""
    return is_not_recorder(hook) and not is_gathering_hook(hook)


def is_idle_or_recorder(hook: Any) -> bool:
    """Return whether `hook` does nothing at this call, or only collects its module's output for transformers."""
    recorder = recorder_of(None, hook)
    return recorder is not None and (recorder.is_plain or not recorder.is_wanted)


def _is_live(hook: Any) -> bool:
    recorder = recorder_of(None, hook)
    return recorder is None or recorder.is_wanted
