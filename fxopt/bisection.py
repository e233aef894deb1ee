"""Which rewrites make a user's check fail: as few of them as do, found by running the check with some left out."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.capture.installation import check_model, check_uncompiled, find_installation
from fxopt.errors import FxoptError
from fxopt.graph.view import location_in, location_of, module_of
from fxopt.installing import new_installation
from fxopt.options import Options, check_options
from fxopt.pipeline import ALL, make_transform
from fxopt.rewriting.failures import function_place, line_in, said_by
from fxopt.rewriting.pattern import Match
from fxopt.rewriting.user_files import module_of_file

Check = Callable[[nn.Module], object]
LEFT_OUT = "left out while bisecting"


@dataclasses.dataclass(frozen=True)
class Culprits:
    """The `rewrites` that make a check fail together, none of which can be left out, and how it failed with them.

    Each is named "pattern in region: module (file:line)" and stands for all layers that it was made in. Empty where
    the check holds with all of them.
    """

    rewrites: tuple[str, ...]
    failure: str
    num_rewrites: int
    num_runs: int

    def __str__(self) -> str:
        """Return the result as text."""
        rewrites = "1 rewrite" if self.num_rewrites == 1 else f"{self.num_rewrites} rewrites"
        tried = f"{rewrites}, {self.num_runs} runs of the check"
        if not self.rewrites:
            return f"the check holds with all rewrites ({tried})"
        plural = "s make" if len(self.rewrites) > 1 else " makes"
        lines = [f"{len(self.rewrites)} rewrite{plural} the check fail ({tried}):"]
        return "\n".join([*lines, *(f"  {name}" for name in self.rewrites), f"it fails with: {self.failure}"])


def bisect(
    model: nn.Module,
    check: Check,
    *,
    patterns: Sequence[Any] = ALL,
    on_progress: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Culprits:
    """Return the rewrites that make `check(model)` fail, found by running it with some of them left out.

    `check` runs a training step or more; it fails where it raises or returns something false other than None. Weights,
    buffers and random states are the same before each run, and as they were at the end; the model is left stock, or
    optimized as it came. `patterns` are those to try on a stock model; an optimized one keeps its own.

    Raises:
        FxoptError: the check fails on the stock model, at first or at last, takes no model, or made no training call.

    >>> import torch, fxopt
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    >>> def check(model):
    ...     assert model(torch.randn(2, 4)).sum().backward() is None
    >>> print(fxopt.bisect(model, check, on_progress=lambda line: None))
    the check holds with all rewrites (1 rewrite, 2 runs of the check)
    """
    model = check_model(model)
    _check_takes_a_model(check)
    installed = find_installation(model)
    options = (
        installed.options
        if installed is not None
        else check_options(
            ALL, patterns=patterns, disable=(), lowering="auto", verify="on", strict=False, partial=True
        )
    )
    if installed is not None:
        installed.remove()
    try:
        check_uncompiled(model)
        return _Bisection(model, check, options, on_progress).run()
    finally:
        if installed is not None:
            installed.install()


def _check_takes_a_model(check: Check) -> None:
    try:
        inspect.signature(check).bind(None)
    except TypeError as error:
        place = f" at {function_place(check)}" if inspect.isfunction(check) else ""
        raise FxoptError(
            f"check: cannot be called as check(model){place}: {error}\ngive a function of one argument, the model"
        ) from error
    except ValueError:  # a callable without a signature
        return


class _Bisection:
    """The runs of one check; what the model holds is put back after each."""

    def __init__(
        self, model: nn.Module, check: Check, options: Options, on_progress: Callable[[str], None]
    ) -> None:
        self._model, self._check, self._options, self._on_progress = model, check, options, on_progress
        tensors = (*model.parameters(), *model.buffers())
        self._state = [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_meta]
        self._num_runs = 0
        self._num_rewrites = 0
        self._seen: dict[str, None] = {}
        self._known: dict[frozenset[str] | None, str] = {}
        self._failure = ""

    def run(self) -> Culprits:
        """Return the culprits."""
        failure = self._try(None)
        if failure:
            raise FxoptError(
                f"check: fails on the stock model, expected it to hold there: {failure}\n"
                "give a check that the model passes before fxopt.optimize"
            )
        failure = self._try_with(None)
        names = tuple(self._seen)
        if not names:
            raise FxoptError(
                "check: no rewrite was made while it ran, expected a training step of a model that has some\n"
                "run forward and backward in the check, with gradients switched on"
            )
        found = self._reduce(names, failure) if failure else ()
        if found:
            self._try_stock_again()
        return Culprits(found, self._failure if found else "", len(names), self._num_runs)

    def _try_stock_again(self) -> None:
        """Make sure that the check fails for the rewrites, and not because it has been run before.

        Raises:
            FxoptError: it fails on the stock model now.
        """
        failure = self._try(None)
        verdict = f"fails: {failure}" if failure else "holds"
        self._on_progress(f"fxopt bisect: run {self._num_runs}, the stock model again: the check {verdict}")
        if failure:
            raise FxoptError(
                f"check: held on the stock model at first and fails there now, expected the same each time: {failure}\n"
                "give a check that keeps nothing from run to run, and seeds what it draws"
            )

    def _reduce(self, names: tuple[str, ...], failure: str) -> tuple[str, ...]:
        """Return a part of `names` that fails and of which no single one can be left out (delta debugging)."""
        self._failure = failure
        pieces = 2
        while len(names) > 1:
            size = -(-len(names) // pieces)
            parts = [names[start : start + size] for start in range(0, len(names), size)]
            complements = (
                [tuple(n for n in names if n not in part) for part in parts] if len(parts) > 2 else []
            )
            for candidate in (*parts, *complements):
                failure = self._try_with(candidate)
                if failure:
                    self._failure = failure
                    pieces = 2 if candidate in parts else max(pieces - 1, 2)
                    names = candidate
                    break
            else:
                if len(parts) == len(names):
                    break
                pieces = min(2 * pieces, len(names))
        return names

    def _try_with(self, names: tuple[str, ...] | None) -> str:
        """Return how the check fails with the rewrites `names`, all where None, or ""; each set is tried once."""
        allowed = None if names is None else frozenset(names)
        if allowed in self._known:
            return self._known[allowed]

        def select(region: str, match: Match) -> str:
            node = match.outputs[0]
            line = f" ({location_of(node)})" if location_of(node) else ""
            name = f"{match.pattern.name} in {region or 'the model'}: {module_of(node) or '(itself)'}{line}"
            self._seen.setdefault(name)
            return "" if allowed is None or name in allowed else LEFT_OUT

        options = dataclasses.replace(self._options, select=select)
        installation = new_installation(self._model, options, make_transform(options))
        installation.install()
        try:
            failure = self._try(names)
        finally:
            installation.remove()
        self._known[allowed] = failure
        if allowed is None:
            self._known[frozenset(self._seen)] = failure
            self._num_rewrites = len(self._seen)
        shown = "all rewrites" if names is None else f"{len(names)} of {self._num_rewrites} rewrites"
        verdict = f"fails: {failure}" if failure else "holds"
        self._on_progress(f"fxopt bisect: run {self._num_runs}, {shown}: the check {verdict}")
        return failure

    def _try(self, names: tuple[str, ...] | None) -> str:
        self._num_runs += 1
        devices = sorted({tensor.device.index or 0 for tensor, _ in self._state if tensor.is_cuda})
        random: Any = torch.random
        try:
            with random.fork_rng(devices=devices):
                found: Any = self._check(self._model)
                is_later = any(
                    test(found) for test in (inspect.isawaitable, inspect.isgenerator, inspect.isasyncgen)
                )
                held = found is None or is_later or bool(found)
        except (
            Exception,
            SystemExit,
        ) as error:  # a check that ends Python would end bisecting, as if it held
            frames = [(f.filename, f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)]
            place = location_in(frames)
            return f"{said_by(error)}{f' ({place})' if place else ''}"
        finally:
            self._model.zero_grad(set_to_none=True)
            with torch.no_grad():
                for tensor, saved in self._state:
                    tensor.copy_(saved)
        if is_later:
            raise FxoptError(
                "check: expected a function that runs when it is called, "
                f"got one that returns a {type(found).__name__}\n"
                "write it without async and yield"
            )
        self._check_same_parameters()
        return "" if held else f"it returned {found!r}"

    def _check_same_parameters(self) -> None:
        known = {id(tensor) for tensor, _ in self._state}
        new = [
            name
            for name, value in self._model.named_parameters()
            if not value.is_meta and id(value) not in known
        ]
        if new:
            raise FxoptError(
                f"check: puts other parameters into the model, expected the same ones in each run, got a new {new[0]}\n"
                "give a check that changes their values only"
            )


def load_script(path: Path) -> tuple[nn.Module, Check]:
    """Return what a script for `fxopt bisect` defines: `model`, a module or a function that makes one, and `check`.

    Raises:
        FxoptError: it cannot be run, or lacks one of them.
    """
    module, run = module_of_file(path, "`model` and `check(model)`")
    # As `python script.py` has it, and for good: the check may import what lies beside it when it is called.
    sys.path.insert(0, str(path.resolve().parent))
    _run_in(path, run)
    made, check = (vars(module).get(name) for name in ("model", "check"))
    if made is None or not callable(check):
        missing = "model" if made is None else "check"
        raise FxoptError(
            f"{path}: defines no `{missing}`, expected `model` (a module, or a function that returns one) and "
            "`check(model)`\nsee docs/report.md"
        )
    if not isinstance(made, nn.Module) and callable(made):
        made = _run_in(path, made)
    return check_model(made), check


def _run_in(path: Path, run: Callable[[], Any]) -> Any:
    """Return what `run`, of the script at `path`, returns; what it raises is told with the line of the script."""
    try:
        return run()
    except (Exception, SystemExit) as error:
        raise FxoptError(
            f"{path}{line_in(path, error)}: cannot be run: {said_by(error)}\n"
            "mend the script until python runs it, and its model(), without an error"
        ) from error
