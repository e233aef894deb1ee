"""Layers that write to one slot of a key/value cache: the second attends to the first one's keys, in training too.

Each layer is told its slot by a whole number that it keeps, which a copy of the layer keeps as well. Layers that are
alike in all of theirs may share a slot, or have none; calls that run stock show which.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterator
from typing import Any

from torch import nn

from fxopt.capture.cache_watch import Watch, parameters_of
from fxopt.capture.checkpointing import SWITCH
from fxopt.capture.modules import walk
from fxopt.capture.torch_modules import children_of

SLOT = "a slot of the key/value cache"
CURE = "pass use_cache=False, which is another result, to have such calls served"


Pair = tuple[str, int, int]
"""The path of a list and the places in it of two layers that may share a slot."""


@dataclasses.dataclass
class Shown:
    """What calls of one kind have shown."""

    unseen: set[Pair]
    """The pairs of which no one call has run both layers: calls may drop layers at random."""
    shared: str | None = None
    """The path of a list of layers that share a slot."""
    unread: str | None = None
    """The type of a cache that cannot be looked into."""


class SharedSlots:
    """Whether calls of one model that build a cache have layers read it, by what earlier calls of each kind did."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._find()

    def _find(self) -> None:
        self._layers = find_layers(self._model)
        self._suspects = find_suspects(self._layers)
        self._pairs = frozenset(find_pairs(self._suspects))
        self._shown: dict[Any, Shown] = {}
        """By kind of call."""

    @property
    def suspects(self) -> dict[str, tuple[nn.Module, ...]]:
        """The lists of layers that may share a slot, found anew where layers were put in or taken out since."""
        if any(children_at(self._model, path) != layers for path, layers in self._layers.items()):
            self._find()
        return self._suspects

    @property
    def doubt(self) -> str:
        """What is not known before a training call."""
        return (
            f"{self._named(*self.suspects)} may share {SLOT}: where the first training call shows that they do, calls "
            f"run stock; {CURE}"
        )

    def find_obstacle(self, kwargs: dict[str, Any], *, is_gathered: bool = False) -> str | None:
        """Return why a call that builds a cache runs stock and with it, or None.

        Where ranks gather parameters in one order (`is_gathered`), calls on all of them have to go one way, and what
        the calls of one rank have shown is not known to the others.
        """
        if not self.suspects:
            return None
        shown = self._shown_by(kwargs)
        if shown.shared is not None:
            return f"{self._named(shown.shared)} share {SLOT} and attend to each other's keys; {CURE}"
        if shown.unseen:
            why = "no call has shown yet whether they do"
            if shown.unread is not None:
                why = f"they are given {shown.unread}, expected a transformers.Cache to see whether they do"
            return f"{self._named(*self.suspects)} may share {SLOT}: {why}; {CURE}"
        if is_gathered:
            why = "calls of other ranks, which gather parameters with this one, may show that they do"
            return f"{self._named(*self.suspects)} may share {SLOT}: {why}; {CURE}"
        return None

    def _named(self, *paths: str) -> str:
        return f"layers of {', '.join(path or 'the model' for path in paths)}"

    @contextlib.contextmanager
    def watched(self, kwargs: dict[str, Any]) -> Iterator[None]:
        """See within the scope, which is one stock call with these arguments, whether a slot is written to twice."""
        suspects, shown = self.suspects, self._shown_by(kwargs)
        if shown.shared is not None or not shown.unseen:
            yield
            return
        watch = Watch()
        with contextlib.ExitStack() as hooks:
            for path, layers in suspects.items():
                for layer in set(layers):
                    hooks.enter_context(watch.hooked(path, layer))
            yield
        if shown.shared is None:  # another thread's call may have shown it
            shown.shared = watch.shared
        shown.unread = watch.unread
        if watch.unread is None:
            shown.unseen -= {
                (path, first, second)
                for path, first, second in shown.unseen
                if watch.has_run(suspects[path][first], suspects[path][second])
            }

    def _shown_by(self, kwargs: dict[str, Any]) -> Shown:
        return self._shown.setdefault(self._kind_of(kwargs), Shown(set(self._pairs)))

    def _kind_of(self, kwargs: dict[str, Any]) -> Any:
        """Return what tells apart calls in which layers may be given a cache from those in which they are not."""
        given = frozenset(name for name, value in kwargs.items() if value is not None)
        is_checkpointed = any(vars(module).get(SWITCH) is True for module in walk(self._model))
        return given, kwargs.get("use_cache"), is_checkpointed


def find_suspects(lists: dict[str, tuple[nn.Module | None, ...]]) -> dict[str, tuple[nn.Module, ...]]:
    """Return by path those of `lists` whose layers that take a cache are not all told apart, and these layers.

    One that stands in a list twice is in it twice here. Not found are layers of one slot that differ in another whole
    number (one renumbered in one place only), and those that stand in no list or in two.
    """
    suspects: dict[str, tuple[nn.Module, ...]] = {}
    for path, children in lists.items():
        layers = tuple(layer for layer in children if layer is not None and _takes_cache(layer))
        if len({_mark_of(layer) for layer in layers}) < len(layers):
            suspects[path] = layers
    return suspects


def find_pairs(suspects: dict[str, tuple[nn.Module, ...]]) -> Iterator[Pair]:
    """Yield the pairs of layers that are not told apart."""
    for path, layers in suspects.items():
        marks = [_mark_of(layer) for layer in layers]
        for first, second in itertools.combinations(range(len(layers)), 2):
            if marks[first] == marks[second]:
                yield path, first, second


def find_layers(model: nn.Module) -> dict[str, tuple[nn.Module | None, ...]]:
    """Return by path what the lists in `model` hold that have a layer which takes a cache."""
    lists = {
        path: tuple(children_of(module).values())
        for module, path in walk(model).items()
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict)
    }
    return {
        path: children
        for path, children in lists.items()
        if any(child is not None and _takes_cache(child) for child in children)
    }


def children_at(model: nn.Module, path: str) -> tuple[nn.Module | None, ...]:
    """Return the modules right inside the one at `path`, none where there is none."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = None if module is None else children_of(module).get(name)
    return () if module is None else tuple(children_of(module).values())


def _takes_cache(layer: nn.Module) -> bool:
    """Return whether `layer` takes keys of earlier calls: transformers has "past" in the names of such parameters.

    What models of recurrences take by other names holds states and no keys.
    """
    return any("past" in name for name in parameters_of(layer))


def _mark_of(layer: nn.Module) -> Any:
    """Return what two layers of which neither is told another slot have in common."""
    return type(layer), _numbers_of(layer)


def _numbers_of(layer: nn.Module) -> frozenset[tuple[str, str, int]]:
    """Return by path and name the whole numbers that the modules of `layer` keep, but those that all of them do.

    Engines number all modules of a model, whatever these are.
    """
    numbers = {
        path: {name: value for name, value in vars(module).items() if type(value) is int}
        for module, path in walk(layer).items()
    }
    of_all = functools.reduce(operator.and_, (own.keys() for own in numbers.values()))
    return frozenset(
        (path, name, value)
        for path, own in numbers.items()
        for name, value in own.items()
        if name not in of_all
    )
