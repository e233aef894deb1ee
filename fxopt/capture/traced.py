"""What Dynamo has traced of a model when it comes to the model's backbone, and whether that may be done once more."""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from fxopt.capture import torch_dynamo
from fxopt.capture.held_state import Held, find_changed, is_container, note_held, note_value
from fxopt.capture.model_entry import MODEL
from fxopt.capture.tail import TailRefusal, is_repeatable
from fxopt.graph.names import op_name
from fxopt.graph.view import location_of

NAME = re.compile(r"\w+")


class ReadAnew(TailRefusal):
    """A capture reads what was not noted before the backbone ran; in the next call of its form all is."""


class Traced:
    """What Dynamo had traced of one capture when it came to the backbone `name`: the stock forward has done that.

    The stock forward did so before the backbone ran, and what was captured does it after: nothing that is read outside
    may have changed meanwhile. What captures have read is noted around each run, and all that could be around one of a
    form that none was made for.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        self._name, self._model = name, model
        self._reads: dict[str, types.CodeType] = {}
        """The expressions of what any capture has read, as Dynamo names it in its guards."""
        self._globals: dict[str, Any] = {}
        self._known: set[Any] = set()
        """The forms of calls that a capture was made for."""
        self._form: Any = None
        self._changed: frozenset[str] | None = frozenset()
        """The names of all that the backbone changed in this run; None: only what was read was looked at."""
        self.stale = ""
        """What is read outside and the backbone changed in this run, if anything."""
        self.clear()

    def clear(self) -> None:
        """Forget the capture."""
        self._capture: Any = None
        self._names: frozenset[str] = frozenset()
        self._refusal = ""

    @contextlib.contextmanager
    def watching(self, form: Any) -> Iterator[None]:
        """See what the backbone changes, which runs within the scope, for a call of `form`."""
        self._form = form
        held: dict[int, Held] | None = None if form in self._known else note_held(self._model)
        read = self._note_read()
        yield
        pairs = zip(self._reads, read, self._note_read(), strict=True)
        self.stale = next((name for name, before, now in pairs if before != now), "")
        self._changed = None if held is None else find_changed(held, note_held(self._model))

    def _note_read(self) -> list[Any]:
        return [note_value(self._evaluate(code)) for code in self._reads.values()]

    def _evaluate(self, code: types.CodeType) -> Any:
        return torch_dynamo.evaluate(code, {"L": {MODEL: self._model}, "G": self._globals})

    def _is_noted(self, name: str) -> bool:
        """Return whether the value of an expression was noted in this run, by itself or as an item of containers."""
        while name not in self._reads:
            name, bracket, _ = name.rpartition("[") if name.endswith("]") else ("", "", "")
            if not bracket or not is_container(self._evaluate(torch_dynamo.expression_of(name))):
                return False
        return True

    def note_before(self) -> bool:
        """Note what was traced so far; called while Dynamo traces."""
        capture = torch_dynamo.find_capture()
        is_again, self._capture = self._capture is capture, capture
        self._names = frozenset(node.name for node in capture.graph.nodes)
        self._refusal = ""
        if is_again:
            self._refusal = f"the {self._name} is called more than once"
        elif torch_dynamo.is_nested(capture):
            self._refusal = f"the {self._name} is called inside a nested graph (checkpointing)"
        elif torch_dynamo.changes_python_state() or capture.random_calls:
            self._refusal = (
                f"before the {self._name} objects are changed or random numbers drawn, done twice then"
            )
        return True

    def check(self, gm: fx.GraphModule) -> None:
        """Check what was traced before the backbone in `gm`; see `Backbone.check`."""
        if self._refusal:
            raise TailRefusal(self._refusal)
        # Dynamo notes late what it has read: whether that was before the backbone cannot be told
        reads = torch_dynamo.find_reads(self._capture, MODEL)
        new = [name for name in reads if not self._is_noted(name)]
        if self._changed is None and new:
            self._known.discard(self._form)
            raise ReadAnew(
                f"captured anew, it reads {min(new)}, which was not noted before the {self._name} ran"
            )
        changed = self._changed or frozenset()
        stale = [name for name in new if not changed.isdisjoint(NAME.findall(name))]
        if stale:
            raise TailRefusal(f"the {self._name} changes what is read outside ({min(stale)})")
        self._reads |= reads
        self._globals = torch_dynamo.find_globals(self._capture)
        self._known.add(self._form)
        for node in gm.graph.nodes:
            if node.name in self._names and not is_repeatable(node):
                raise TailRefusal(
                    f"before the {self._name} it reads {op_name(node) or node.name} at {location_of(node)}, which may "
                    "give another value when it is computed again"
                )
