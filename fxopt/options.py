"""What a user may choose, checked once: the fields of one frozen dataclass."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from fxopt.errors import FxoptError, UnknownNameError

LOWERINGS = ("auto", "inductor", "plain")
VERIFY = ("on", "off")
CUDA_GRAPHS = ("auto", "off")
MOST_COPIED = 2**30
"""The bytes that a stack of blocks may copy, all blocks together, to be replayed as CUDA graphs: each keeps a copy of
what all are given, masks and tables of positions. A mask of 16384 x 16384 tokens takes 256 MiB a block."""


class NamedPattern(Protocol):
    """Anything with a name that the pipeline accepts as a pattern."""

    @property
    def name(self) -> str:
        """The pattern's name, as reports and `disable` use it."""
        ...


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `fxopt.optimize`; equal options mean that optimizing again changes nothing.

    `select(region, match)` returns why a match is left out, or "": what bisecting chooses by.
    """

    patterns: tuple[Any, ...]
    disable: frozenset[str] = frozenset()
    lowering: str = "auto"
    verify: str = "on"
    strict: bool = False
    partial: bool = True
    cuda_graphs: str = "auto"
    select: Callable[[str, Any], str] | None = None
    memory_budget: Any = "auto"
    plan: Any = None
    max_host_memory: int | None = None

    @property
    def active_patterns(self) -> tuple[Any, ...]:
        """The patterns that are not disabled, in order."""
        return tuple(pattern for pattern in self.patterns if pattern.name not in self.disable)


def check_options(
    known: Sequence[NamedPattern],
    *,
    patterns: Iterable[NamedPattern | str],
    disable: Iterable[str],
    lowering: str,
    verify: str,
    strict: bool,
    partial: bool,
    cuda_graphs: str = "auto",
    memory_budget: Any = "auto",
    plan: Any = None,
    max_host_memory: int | None = None,
) -> Options:
    """Return checked options; `patterns` may hold names of `known` patterns and patterns of the user's own.

    Raises:
        UnknownNameError: a name that does not exist; the text lists the valid ones, nearest first.
        FxoptError: a value of the wrong type, or a pattern that cannot be matched.
    """
    patterns = _listed("patterns", patterns, "names or fxopt.Pattern objects", "(*fxopt.ALL, MINE)")
    disable = _listed("disable", disable, "names of patterns", "('glu',)")
    by_name = {pattern.name: pattern for pattern in known}
    chosen: list[NamedPattern] = []
    for pattern in patterns:
        if isinstance(pattern, str):
            check_name("patterns", pattern, tuple(by_name))
            pattern = by_name[pattern]
        elif not (isinstance(getattr(pattern, "name", None), str) and _has_terms(pattern)):
            raise FxoptError(
                f"patterns: expected names or fxopt.Pattern objects, got {type(pattern).__name__} "
                f"({pattern!r:.60})\nuse one of {', '.join(by_name)}, or write one with fxopt.Pattern"
            )
        _check_search(pattern)
        chosen.append(pattern)
    names = tuple(pattern.name for pattern in chosen)
    for name in sorted({name for name in names if names.count(name) > 1}):
        raise FxoptError(f"patterns: {name} is given {names.count(name)} times, expected once")
    for name in sorted(disable, key=str):
        check_name("disable", name, tuple(dict.fromkeys((*names, *by_name))))
    disabled = frozenset(disable)
    check_name("lowering", lowering, LOWERINGS)
    check_name("verify", verify, VERIFY)
    check_name("cuda_graphs", cuda_graphs, CUDA_GRAPHS)
    _check_flag("strict", strict)
    _check_flag("partial", partial)
    return Options(
        tuple(chosen),
        disabled,
        lowering,
        verify,
        strict,
        partial,
        cuda_graphs,
        memory_budget=memory_budget,
        plan=plan,
        max_host_memory=max_host_memory,
    )


def _check_flag(subject: str, value: object) -> None:
    if not isinstance(value, bool):
        raise FxoptError(f"{subject}: expected True or False, got {value!r}")


def _has_terms(pattern: object) -> bool:
    return hasattr(type(pattern), "terms")


def _check_search(pattern: Any) -> None:
    """Raise what is wrong with the terms of `pattern` now, not at the first training step."""
    _ = pattern.terms


def _listed(subject: str, value: Any, items: str, example: str) -> tuple[Any, ...]:
    """Return the items of an option that takes several; a name alone is one item."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise FxoptError(
            f"{subject}: expected a list of {items}, got {type(value).__name__} ({value!s:.60})\n"
            f"write {subject}={example}"
        )
    return tuple(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def check_name(subject: str, name: object, valid: tuple[str, ...]) -> None:
    """Raise an UnknownNameError that lists the `valid` names, nearest first, if `name` is none of them."""
    if isinstance(name, str) and name in valid:
        return
    nearest = difflib.get_close_matches(str(name), valid, n=len(valid), cutoff=0.0)
    raise UnknownNameError(f"{subject}: unknown name {name!r}, expected one of {', '.join(nearest)}")
