"""The callables fxopt puts into modules' compile slots, and how each call chooses its path.

A module's slot (`_compiled_call_impl`, what `module.compile()` fills) replaces neither `forward` nor any
class; copies and pickles of the module do not carry it. Evaluation, `no_grad` and cached calls run the
stock path by design. A training call that cannot be served runs the stock path and is counted.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from fxopt.capture import torch_dynamo, torch_errors, torch_modes, torch_modules, torch_settings, zero
from fxopt.capture.checkpointing import Checkpointing, is_checkpointed
from fxopt.capture.cuda_graphs import CudaGraphs
from fxopt.capture.engines import find_kept, say_kept
from fxopt.capture.forwards import call_with_forward, call_with_gathered, run_captured
from fxopt.capture.four_bits import FourBitLayers
from fxopt.capture.hooks import (
    Hooks,
    InnerHooks,
    has_hooks,
    hooked_inside,
    hooks_hidden,
    is_idle_or_recorder,
    place_of_hook,
)
from fxopt.capture.ledger import WITHOUT_GRADIENTS, Ledger, Way
from fxopt.capture.modules import tensors_of
from fxopt.capture.pieces import or_as_captured
from fxopt.capture.places import caller_line, forward_line, with_place
from fxopt.capture.planning import Call, Mark, Planner, call_of
from fxopt.capture.reasons import reason_of
from fxopt.capture.recorders import Notes, Recorder, collecting
from fxopt.capture.turns import StockCheck, turns_entry
from fxopt.errors import TurnsError

log = logging.getLogger("fxopt")

PLAIN_VALUES = (torch.Tensor, type(None), bool, int, float, str, torch.dtype, torch.device)

NO_TURN = "its loop over hits was not captured for one turn"
NO_PIECE = "its graph breaks before a piece of it could be captured"


def block_entry(block: nn.Module, count_eager: Callable[[], None], args: Any, kwargs: Any) -> Any:
    """Run `block`'s forward; Dynamo captures this frame, and what runs it uncaptured is counted."""
    if not torch.compiler.is_compiling():
        count_eager()
    return block.forward(*args, **kwargs)


MakeBackend = Callable[[Mark | None, bool], Callable[..., Any]]
"""Takes what tags the joint graph, and whether CUDA graphs replay what is compiled."""


class BlockCalls:
    """Makes the calls of one stack's blocks; those of one form with one plan share their captures."""

    def __init__(
        self,
        ledger: Ledger,
        region: str,
        make_backend: MakeBackend,
        checkpointing: Checkpointing,
        cuda_graphs: CudaGraphs,
        *,
        partial: bool,
        planner: Planner | None = None,
        num_blocks: int = 1,
    ) -> None:
        self.ledger = ledger
        self.region = region
        self._make_backend = make_backend
        self._checkpointing = checkpointing
        self._cuda_graphs = cuda_graphs
        self._planner = planner
        self._num_blocks = num_blocks
        self._asked: list[Call] = [Call(1, False)]
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.pieces = None
        if partial:
            backend = or_as_captured(make_backend(None, False), ledger, region)
            self.pieces = torch_dynamo.compile_frame(block_entry, backend, fullgraph=False)
        self._inner_hooks: dict[nn.Module, InnerHooks] = {}
        self._four_bits: dict[nn.Module, FourBitLayers] = {}
        self._forms: dict[nn.Module, int] = {}
        self._numbers: dict[tuple[Any, ...], int] = {}
        """The number of each form."""
        self.notes = Notes()
        self.note_end: Callable[[str], None] = lambda path: None
        """Called when a block has run."""
        self.broken_classes: set[type] = set()
        self._looping_classes: set[type] = set()
        self.stock_classes: dict[type, str] = {}

    @property
    def frames(self) -> tuple[Callable[..., Any], ...]:
        """The frames that Dynamo has captured whole blocks in: one of each form and variant."""
        return tuple(self._compiled.values())

    def begin(self, path: str, block: nn.Module) -> Callable[..., Any]:
        """Return what runs one block, again where its backward pass recomputes it: both collect the same outputs."""
        recorders: list[tuple[Recorder, ...]] = []

        def run(*args: Any, **kwargs: Any) -> Any:
            output = self._run(path, block, recorders, args, kwargs)
            self.note_end(path)
            return output

        return run

    def _run(
        self,
        path: str,
        block: nn.Module,
        recorders: list[tuple[Recorder, ...]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run one block: compiled where fxopt serves the call, else stock."""
        if not torch.is_grad_enabled():
            self.ledger.note_way(path, WITHOUT_GRADIENTS)
            return torch_modules.stock_call(block, *args, **kwargs)
        if block not in self._inner_hooks:
            self._inner_hooks[block] = InnerHooks(block)
            self._four_bits[block] = FourBitLayers(block)
            self._forms[block] = self._numbers.setdefault(_form_of(block), len(self._numbers))
        hooks = self._inner_hooks[block].find()
        if recorders:
            hooks = dataclasses.replace(hooks, recorders=recorders[0])
        else:
            recorders.append(hooks.recorders)
        if hooks.live is not None:
            self.ledger.hooked = hooked_inside(block, hooks.live)
        reason = self.find_obstacle(block, hooks, args, kwargs)
        if reason is not None:
            self._count_stock(path, reason)
            stock = functools.partial(torch_modules.stock_call, block)
            if hooks.gathers:
                stock = functools.partial(call_with_gathered, block)
            return self._checkpointing.run_unplanned(block, stock, args, kwargs)
        serve: Callable[..., Any] = functools.partial(self._serve, path, block, hooks)
        if hooks.recorders and is_checkpointed(block):
            # Under capture nothing that a block computes leaves its own checkpoint but what it returns.
            serve = functools.partial(self._checkpointing.run_outside, block, serve)
        if hooks.gathers or zero.is_linear_replaced():
            serve = functools.partial(run_captured, block, serve)
        if has_hooks(block):
            return call_with_forward(block, serve, args, kwargs)
        return serve(*args, **kwargs)

    def _serve(self, path: str, block: nn.Module, hooks: Hooks, *args: Any, **kwargs: Any) -> Any:
        """Run `block`'s forward compiled: whole, else in pieces, or as it is where neither can be captured."""
        self._four_bits[block].restore()
        broken = type(block) in self.broken_classes
        try:
            return self._run_compiled(self.pieces if broken else None, path, block, hooks, args, kwargs)
        except torch_errors.CAPTURE_ERRORS as error:
            self.ledger.progress.wipe()
            reason = with_place(self._reason_of(error), forward_line(block))
            reason = find_kept((block,)) or reason
            can_break = not torch_errors.is_of_backend(error) or torch_errors.hangs_on_values(error)
            is_of_loop = torch_errors.hangs_on_values(error) and not (
                torch_errors.is_of_backend(error) or torch_errors.is_of_limit(error)
            )
            may_loop = is_of_loop and not broken and type(block) not in self._looping_classes
            is_own_failure = torch_errors.is_of_backend(error) and not torch_errors.hangs_on_values(error)
        if may_loop:
            found = self._serve_looping(path, block, hooks, args, kwargs)
            if found is not None:
                return found[0]
        dtypes = [parameter.dtype for parameter in block.parameters()]
        is_captured, output = False, None
        if self.pieces is not None and not broken and can_break:
            try:
                output = self._run_compiled(self.pieces, path, block, hooks, args, kwargs, reason)
                is_captured = True
            except torch_errors.CAPTURE_ERRORS as error:
                self._reason_of(error)
        if not is_captured:
            # A call that fails in stock too says nothing of the block.
            output = self._checkpointing.run_unplanned(block, block.forward, args, kwargs)
            self._count_stock(path, f"capture failed: {reason}")
        if dtypes != [parameter.dtype for parameter in block.parameters()]:
            # The call cast a weight for good, as four-bit layers do with a bias: the next call can be captured.
            return output
        if is_captured:
            self.ledger.broken.setdefault(self.region, reason)
            self.broken_classes.add(type(block))
            is_checkpointed = block in self._checkpointing.taken
            if self._planner is not None and self._planner.is_asked(checkpointed=is_checkpointed):
                self.ledger.note(f"{self.region}: blocks in pieces are not planned")
        else:
            self.stock_classes[type(block)] = reason
            self.ledger.refused[self.region] = reason
            if is_own_failure:
                log.warning("%s runs as stock, slower and with more memory: %s", self.region, reason)
        return output

    def _serve_looping(
        self, path: str, block: nn.Module, hooks: Hooks, args: Any, kwargs: Any
    ) -> tuple[Any] | None:
        """Run `block`'s forward with its loops over hits captured for one turn, and return (its result,) or None."""
        self._looping_classes.add(type(block))
        check = StockCheck(block, args, kwargs)
        try:
            output = self._run_compiled(None, path, block, hooks, args, kwargs)
            with collecting({}):
                agrees = check.agrees(output)
            if agrees:
                return (output,)
            self.ledger.note(f"{self.region}: {NO_TURN}: what it counts in Python would be counted once")
            check.undo()
        except torch_errors.CAPTURE_ERRORS as error:
            self._reason_of(error)
            cause = torch_errors.root_cause(error)
            if isinstance(cause, TurnsError):  # without such a loop, why the block breaks is told already
                self.ledger.note(f"{self.region}: {NO_TURN}: {cause}")
        self.ledger.progress.wipe()
        self._looping_classes.discard(type(block))
        return None

    def _reason_of(self, error: Exception) -> str:
        """Return why a block could not be captured.

        Raises:
            FxoptError, VerifyError: `error` wraps a mistake of the user's or of a pass.
        """
        cause = torch_errors.cause_to_raise(error)
        if cause is not None:
            raise cause from None
        return reason_of(error)

    def find_obstacle(
        self, block: nn.Module, hooks: Hooks, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        """Return why this call cannot be served, or None."""
        if type(block) in self.stock_classes:
            return f"capture failed: {self.stock_classes[type(block)]}"
        if torch_settings.is_switched_off():
            return "Dynamo is switched off"
        if torch_modules.has_global_hooks():
            return "hooks for all modules are registered"
        mode = torch_modes.find_mode()
        if mode is not None:
            return mode
        if hooks.live is not None:
            hooked = f"a hook sits on the {type(hooks.live).__name__} inside: calls of this block run stock"
            return say_kept(hooks.live) or with_place(hooked, place_of_hook(block, hooks.live))
        return find_opaque(args, kwargs)

    def _run_compiled(
        self,
        pieces: Callable[..., Any] | None,
        path: str,
        block: nn.Module,
        hooks: Hooks,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        broken: str = "",
    ) -> Any:
        """Run a block's forward captured whole, or by the frame of its pieces, which nobody plans.

        `broken` says why it is not captured whole, where the ledger does not know yet.
        """
        self.ledger.begin(path)
        if not self.ledger.captures:
            self.ledger.progress.show(path or self.region, "capturing")
        if pieces is None:
            compiled = self._find_compiled(path, block, hooks, args, kwargs)
            with self._hooks_of_frame(block, hooks):
                return compiled(block, self._count_eager, args, kwargs)
        run = functools.partial(self._run_pieces, pieces, block, hooks)
        output = self._checkpointing.run_unplanned(block, run, args, kwargs)
        if not self.ledger.is_served:
            reason = "; ".join(filter(None, (NO_PIECE, broken or self.ledger.broken.get(self.region))))
            self.ledger.count_fallback(self.region, reason)
            self.ledger.refused.setdefault(self.region, reason)
        return output

    def _run_pieces(
        self, pieces: Callable[..., Any], block: nn.Module, hooks: Hooks, *args: Any, **kwargs: Any
    ) -> Any:
        with torch_dynamo.frames_of_pieces_captured(), self._hooks_of_frame(block, hooks):
            return pieces(block, self._count_eager, args, kwargs)

    @contextlib.contextmanager
    def _hooks_of_frame(self, block: nn.Module, hooks: Hooks) -> Iterator[None]:
        """Hide hooks inside `block` within the scope, and hand on at its end what recorders among them collect."""
        if not hooks.idle and not hooks.recorders:
            yield
            return
        with hooks_hidden(block.modules(), is_idle_or_recorder), self.notes.placed(hooks.recorders):
            yield
            noted = list(self.notes.noted)
        for place, value in noted:
            hooks.recorders[place].deliver(value)

    def _find_compiled(
        self, path: str, block: nn.Module, hooks: Hooks, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        """Return the frame that serves this call: each form, variant and way to run has captures of its own."""
        variant = None
        if self._planner is not None:
            self._asked[0] = call_of(args, kwargs, block in self._checkpointing.taken)
            variant = self._planner.find_variant(path, self._asked[0])
        graphed = self._cuda_graphs.serve(args, kwargs, self._num_blocks)
        is_looping = type(block) in self._looping_classes
        key = (self._forms[block], variant, graphed, is_looping, _places_of(block, hooks.recorders))
        if key not in self._compiled:
            backend = self._make_backend(self._make_mark(variant), graphed)
            entry = turns_entry if is_looping else block_entry
            self._compiled[key] = torch_dynamo.compile_frame(entry, backend, fullgraph=True)
        return self._compiled[key]

    def _make_mark(self, variant: int | None) -> Mark | None:
        """Return what shows the planner a joint graph; torch may keep it for good, so it holds no block."""
        planner, ledger, asked = self._planner, self.ledger, self._asked
        if planner is None or variant is None:
            return None

        def show(graph: fx.Graph, held: frozenset[int]) -> str:
            return planner.mark_block(ledger.current, variant, asked[0], graph, held)

        return Mark(show)

    def _count_stock(self, path: str, reason: str) -> None:
        self.ledger.count_fallback(self.region, reason)
        self.ledger.note_way(path, Way(None, reason))

    def _count_eager(self) -> None:
        self.ledger.count_fallback(self.region, "Dynamo ran the block uncaptured")


def _form_of(block: nn.Module) -> tuple[Any, ...]:
    """Return what tells the frames of blocks apart that differ in size: their class, and their tensors' shapes.

    Each is captured with sizes of its own. In one frame Dynamo would take what differs from one to the next, width and
    height and channels alike, for sizes that change, and simplify products of quotients of them for minutes. It is
    that of a block's first call: where tensors come to differ later, captures of one frame tell them apart.
    """
    return type(block), tuple(map(zero.whole_shape, tensors_of(block)))


def _places_of(block: nn.Module, recorders: tuple[Recorder, ...]) -> tuple[tuple[str, str, int], ...]:
    """Return what tells the frames of blocks apart that collect outputs: Dynamo looks at no hook again."""
    if not recorders:
        return ()
    paths = {module: path for path, module in block.named_modules()}
    return tuple((paths[each.module], each.key, each.index) for each in recorders)


def find_opaque(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return a reason, with the line of the call, when an argument is no tensor, plain value or container of these."""
    for name, value in (*((f"argument {i}", a) for i, a in enumerate(args)), *kwargs.items()):
        queue = [value]
        while queue:
            item = queue.pop()
            if type(item) in (tuple, list, torch.Size):
                queue.extend(item)
            elif type(item) is dict or isinstance(item, collections.UserDict):  # one that layers share, say
                queue.extend(item.values())
            elif not isinstance(item, PLAIN_VALUES):
                return with_place(f"{name} is a {type(item).__name__}", caller_line())
    return None


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Return whether `function` takes an argument called `name` by its signature."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def takes_any(function: Callable[..., Any]) -> bool:
    """Return whether `function` passes on keyword arguments that its signature does not name."""
    try:
        return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return False
