"""The call of the whole model: stock Python up to the last block, then the compiled tail.

Dynamo captures the model's forward once with each block as one leaf (`StandIns`); the tail of that capture is
compiled. At a call, the compiled frame checks its guards and runs the trunk, which is the stock forward,
interrupted when the last block has returned (`Trunk`), and then the tail on the blocks' values.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fxopt.capture import (
    torch_dynamo,
    torch_errors,
    torch_modes,
    torch_modules,
    torch_settings,
    torch_tensors,
)
from fxopt.capture.around import find_around, find_tail_modules, find_trunk_modules
from fxopt.capture.behind import NOT_CAPTURED, Behind
from fxopt.capture.cache import Cache
from fxopt.capture.checkpointing import Checkpointing
from fxopt.capture.collecting import uncollected
from fxopt.capture.cuda_graphs import CudaGraphs
from fxopt.capture.dispatch import find_opaque
from fxopt.capture.engines import Sharding, find_kept
from fxopt.capture.forwards import call_model_gathered, call_with_forward, run_uncaptured
from fxopt.capture.hooks import (
    has_hooks,
    has_own_hooks,
    hooked_inside,
    is_not_recorder,
    place_of_hook,
)
from fxopt.capture.lazy import put_through
from fxopt.capture.leaves import Leaves
from fxopt.capture.ledger import Ledger
from fxopt.capture.meta_trunk import MetaTrunk
from fxopt.capture.model_entry import model_entry
from fxopt.capture.modules import tensors_of, walk
from fxopt.capture.patched import find_own_forwards
from fxopt.capture.places import forward_line, with_place
from fxopt.capture.reasons import reason_of
from fxopt.capture.recorders import (
    active,
    count_collected,
    find_added,
    find_asked,
    flatten,
    install_recorders,
    is_of_recorders,
    may_collect,
)
from fxopt.capture.shortage import Shortage
from fxopt.capture.stand_in import StandIns
from fxopt.capture.tail import Tail, TailRefusal
from fxopt.capture.trunk import TailMismatch, Trunk, find_other_form
from fxopt.capture.zero import Gathering
from fxopt.report.records import MODEL_REGION

log = logging.getLogger("fxopt")
OUTSIDE = (
    "blocks were called with gradients, but not by a call of the optimized {model}: what stands after them ran stock "
    "there. Sites are those of the {model}'s own calls; fxopt.optimize the model that is called"
)


class OfThread(threading.local):
    """What holds in one thread: whether it is within a call of the model."""

    is_within = False


class ModelCall:
    """Makes the calls of one model whose blocks are regions of their own."""

    def __init__(
        self,
        ledger: Ledger,
        model: nn.Module,
        blocks: dict[str, nn.Module],
        backend: Callable[..., Any],
        backend_behind: Callable[..., Any],
        checkpointing: Checkpointing,
        cuda_graphs: CudaGraphs,
        cache: Cache,
    ) -> None:
        self.ledger = ledger
        self.model = model
        self.blocks = frozenset(blocks.values())
        self._frames = torch_dynamo.FramesByForm(model_entry, backend, fullgraph=True)
        self._checkpointing = checkpointing
        self._cuda_graphs = cuda_graphs
        self.obstacles: dict[Any, str] = {}
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._thread = OfThread()
        self._settings = torch_settings.make_capture_settings()
        self._around = (model, *find_around(model, self.blocks))
        self._sharding = Sharding(model, self.blocks, self._around)
        self.behind = Behind(model, self.blocks, self._around, backend_behind, ledger)
        self._not_whole: dict[Any, str] = {}
        """By form of a call: why it cannot be captured whole, but may be behind the backbone."""
        self._cache = cache
        self.stand_ins = StandIns()
        self._collects = False
        """Whether the leaves hand on what transformers collects inside their blocks."""
        self.collect: Callable[[], None] = lambda: None
        """Makes them do so; called once."""
        self.share: Callable[[], None] | None = None
        """Makes the leaves hand on mappings; called once, where the model cannot be captured without."""
        self.note_begin: Callable[[], None] = lambda: None
        """Called when a call begins that is served."""
        self.shortage: Shortage | None = None
        """Where the model may be planned: what is done when a forward pass runs out of memory."""
        self._trunk = Trunk(model)
        self._meta_trunk = MetaTrunk(model, ledger.note)
        self._arguments: tuple[Any, Any] = ((), {})
        self._leaves = Leaves(model, self.blocks)

    @property
    def frames(self) -> tuple[Callable[..., Any], ...]:
        """The frames that Dynamo captures the model in."""
        return (*self._frames.frames(), *self.behind.frames)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model: with the compiled tail where fxopt serves the call, else stock Python."""
        outer, self._thread.is_within = self._thread.is_within, True
        try:
            return self._run(*args, **kwargs)
        finally:
            self._thread.is_within = outer

    @property
    def _is_running(self) -> bool:
        """Whether a stock forward is being run for a call of the model, so that a nested call of it is a stock one."""
        return self.behind.is_running or self._trunk.is_running or self._meta_trunk.is_running

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        with torch_settings.capture_scope(self._settings):
            if not torch.is_grad_enabled() or self._is_running:
                return torch_modules.stock_call(model, *args, **kwargs)
            gatherings = self._sharding.find_gatherings()
            kept = self._cache.find_obstacle(kwargs, is_gathered=bool(gatherings))
            kwargs = self._cache.declined(kwargs) if kept is None else kwargs
            reason = kept or self.find_obstacle(args, kwargs)
            around = self._cache.switched_off if kept is None else self._cache.watched
            if reason is None and not self._lock.acquire(blocking=False):
                reason, around = "another thread runs the model", contextlib.nullcontext
            if reason is not None:
                self.ledger.count_fallback(MODEL_REGION, reason)
                with around(kwargs):
                    return self._run_stock(gatherings, args, kwargs, is_cache_kept=kept is not None)
            self._owner = threading.get_ident()
            self.note_begin()
            try:
                with (
                    self._cache.switched_off(kwargs),
                    self._checkpointing.taken_over(),
                    self._cuda_graphs.step(),
                ):
                    if gatherings:
                        output = call_model_gathered(model, gatherings, self._serve_within, args, kwargs)
                    elif has_hooks(model):
                        output = call_with_forward(model, self._serve_within, args, kwargs)
                    else:
                        output = self._serve_within(*args, **kwargs)
                    return self._cuda_graphs.copy_out(output)
            finally:
                self._owner = None
                self._lock.release()

    def _run_stock(
        self,
        gatherings: list[Gathering],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        is_cache_kept: bool,
    ) -> Any:
        """Run the model as stock does, but for the order in which ranks gather: that of ranks that serve the call."""
        if gatherings and is_cache_kept:
            # The blocks checkpoint themselves, as in stock: transformers then drops the cache. No rank serves such a
            # call, so that all gather in this order.
            return call_model_gathered(self.model, gatherings, self._run_uncaptured, args, kwargs)
        if gatherings:
            # Other ranks may serve the call: the planner then takes over the blocks' checkpointing, which decides
            # what is gathered again in backward, so it does here too.
            with self._checkpointing.taken_over():
                return call_model_gathered(self.model, gatherings, self._run_uncaptured, args, kwargs)
        forward = self._sharding.find_stock_forward()
        if forward is not None:
            return call_with_forward(self.model, forward, args, kwargs)
        return torch_modules.stock_call(self.model, *args, **kwargs)

    def _serve_within(self, *args: Any, **kwargs: Any) -> Any:
        """Serve the call; where memory runs out, once more under a plan that needs less."""
        shortage = self.shortage
        if shortage is None:
            return self._serve(*args, **kwargs)
        return shortage.run(functools.partial(self._serve, *args, **kwargs))

    def _serve(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward with the compiled tail, or as it is where that cannot be had."""
        if self.shortage is not None and self.shortage.needs_tail:
            self._frames.clear()
            self.behind.compile_anew()
        reason = self._not_whole.get(self._form_of(args, kwargs)) if self._not_whole else None
        if reason is not None:
            return self._serve_behind(args, kwargs, reason)
        try:
            return self._capture_and_run(*args, **kwargs)
        except torch_errors.CAPTURE_ERRORS as error:
            reason = self._explain(error)
        except TailMismatch as error:
            text = with_place(str(error), forward_line(self.model))
            self.ledger.count_fallback(MODEL_REGION, text)
            if error.output is not None:
                return error.output[0]
        finally:
            self.stand_ins.clear()
        if reason is None:
            return self._run_uncaptured(*args, **kwargs)
        if self.behind.find_backbone() is not None:
            output = self._serve_behind(args, kwargs, reason)
            self._not_whole[self._form_of(args, kwargs)] = reason  # not where the call fails, in stock too
            return output
        output = self._run_uncaptured(*args, **kwargs)
        self._refuse(f"{NOT_CAPTURED}: {reason}", args, kwargs)
        return output

    def _serve_behind(self, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
        """Run the call captured behind its backbone where that can be; `reason` is why it was not captured whole."""
        backbone = self.behind.find_backbone()
        obstacle = (
            "its weights are sharded" if backbone is None else self.behind.find_obstacle(backbone, kwargs)
        )
        if backbone is None or obstacle is not None:
            self.ledger.count_fallback(MODEL_REGION, f"{NOT_CAPTURED}: {reason}; {obstacle}")
            for line in find_own_forwards(self.model):
                self.ledger.note(line)
            return self._run_uncaptured(*args, **kwargs)
        return self.behind.run(backbone, args, kwargs, reason)

    def _explain(self, error: Exception) -> str:
        """Return why the model was not captured.

        Raises:
            Exception: what `error` wraps, where that is the user's or a pass's mistake.
        """
        self.ledger.progress.wipe()
        cause = torch_errors.cause_to_raise(error)
        if cause is not None:
            raise cause from None
        root = torch_errors.root_cause(error)
        return find_kept(self.blocks) or (
            with_place(str(root), forward_line(self.model))
            if isinstance(root, TailRefusal)
            else reason_of(error, self.stand_ins.failed_in)
        )

    def _refuse(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count a call that ran as it is, as all calls of its form will from now on.

        One that fails in stock too comes not so far: it is no obstacle to others.
        """
        self.obstacles[self._form_of(args, kwargs)] = reason
        if MODEL_REGION not in self.ledger.served:
            if not self.ledger.captures and MODEL_REGION not in self.ledger.refused:
                log.warning("the model runs as stock, slower and with more memory: %s", reason)
            self.ledger.refused[MODEL_REGION] = reason
        self.ledger.count_fallback(MODEL_REGION, reason)
        for line in find_own_forwards(self.model):
            self.ledger.note(line)

    def _run_uncaptured(self, *args: Any, **kwargs: Any) -> Any:
        return run_uncaptured(self.model, self._sharding.find_gatherings(), args, kwargs)

    def find_obstacle(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Return why the tail cannot serve this call, or None."""
        obstacle = self.obstacles.get(self._form_of(args, kwargs)) if self.obstacles else None
        if obstacle is not None:
            return obstacle
        if torch_settings.is_switched_off():
            return "Dynamo is switched off"
        if torch_modules.has_global_hooks():
            return "hooks for all modules are registered"
        mode = torch_modes.find_mode()
        if mode is not None:
            return mode
        hooked = next((block for block in self.blocks if has_own_hooks(block)), None)
        if hooked is not None:
            return hooked_inside(hooked, hooked)
        sharded = self._sharding.find_obstacle()
        if sharded is not None:
            return sharded
        return find_opaque(args, kwargs)

    def _form_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        asked = find_asked(walk(self.model, but=self.blocks), kwargs)
        return form_of(args, kwargs), asked, self.model.training

    def _capture_and_run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward compiled; where it cannot be captured with plain leaves, try leaves that hand on more."""
        if may_collect(walk(self.model, but=self.blocks), kwargs):
            self._collect_outputs()
        try:
            return self._run_compiled(*args, **kwargs)
        except torch_errors.CAPTURE_ERRORS as error:
            if torch_errors.cause_to_raise(error) is not None:
                raise
            if not self._collects and is_of_recorders(error):
                hand_on: Callable[[], None] | None = self._collect_outputs
            else:
                hand_on, self.share = self.share, None
            if hand_on is None:
                raise
        hand_on()
        self.stand_ins.clear()
        return self._capture_and_run(*args, **kwargs)

    def _collect_outputs(self) -> None:
        """Make the leaves hand on what transformers collects inside their blocks, with its hooks in their places."""
        install_recorders(walk(self.model, but=self.blocks))
        if not self._collects:
            self._collects = True
            self.collect()

    def _run_compiled(self, *args: Any, **kwargs: Any) -> Any:
        self.ledger.begin(MODEL_REGION)
        is_first = not self.ledger.captures and not self.ledger.refused
        if is_first:
            self.ledger.progress.show("the model around its blocks", "capturing")
        previous = self._arguments
        self._arguments = (args, kwargs)
        try:
            with (
                uncollected(needed=is_first),
                self._leaves.called(),
                torch_settings.tensors_left_unlisted(self._around),
                self._sharding.gathered(),
                self._leaves.hooks_hidden(is_not_recorder if self._collects else lambda hook: True),
            ):
                return self._frames.frame_of(args, kwargs)(self.model, self._count_eager, args, kwargs)
        finally:
            self._arguments = previous

    def _count_eager(self) -> None:
        self.ledger.count_fallback(MODEL_REGION, "Dynamo ran the model uncaptured")

    def call_block(
        self, block: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a block in the trunk through `run`, checkpointed where its own call would have been.

        While one thread runs the model, blocks called by another one run stock: what a call is planned for and what
        serves it are noted once for the model. One that is called outside of the model's calls is noted.
        """
        if self._owner not in (None, threading.get_ident()):
            return torch_modules.stock_call(block, *args, **kwargs)
        if not self._thread.is_within and torch.is_grad_enabled() and not torch_tensors.is_in_backward():
            self.ledger.note(OUTSIDE.format(model=type(self.model).__name__))
        if self._meta_trunk.is_running:
            return self._meta_trunk.give(args, kwargs)
        collected = (self._collects and active()) or {}
        counts = count_collected(collected)
        if block in self._leaves.checkpointed:
            checkpoint: Any = block._gradient_checkpointing_func
            value = checkpoint(functools.partial(run, **kwargs), *args)
        else:
            value = run(*args, **kwargs)
        if self.shortage is not None:
            self.shortage.after_block()
        return self._trunk.after_block(
            value, flatten(value, find_added(counts, collected)) if collected else value
        )

    def compile_tail(self, tail: Tail, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the callable Dynamo runs for a captured model: the trunk, then `call` on its values.

        Dynamo holds it until this model's frame dies, so it holds neither the model nor its modules.
        """
        leaf_nodes = [node for node in tail.graph.graph.nodes if node.op == "placeholder"][: len(tail.leaves)]
        examples = [node.meta["example_value"] for node in leaf_nodes]
        before = weakref.WeakSet(find_trunk_modules(self.model, tail))
        modules = [weakref.ref(module) for module in find_tail_modules(self.model, self.blocks, tail.graph)]
        on_meta = any(tensor.is_meta for tensor in tensors_of(self.model))
        rehearsed = tail.calls if on_meta else ()
        leaves, placeholders, num_calls = tail.leaves, tail.placeholders, len(tail.calls)
        wanted = frozenset(index for index, _ in leaves)
        find_self = weakref.ref(self)

        def values_of(calls: list[Any]) -> list[Any]:
            return [calls[index] if item is None else calls[index][item] for index, item in leaves]

        def judge(calls: list[Any]) -> str | None:
            this = find_self()
            if this is not None and this.ledger.hooked:
                return this.ledger.hooked
            if this is not None and this.ledger.changes_state:
                return "a block keeps values in Python objects, which the model may read after the blocks"
            try:
                values = values_of(calls)
            except (IndexError, TypeError):
                return "a block returned or collected less than when the model was captured"
            pairs = zip(values, examples, strict=True)
            reason = next((reason for pair in pairs if (reason := find_other_form(*pair)) is not None), None)
            return reason or (None if this is None else this._sharding.judge(values))

        def run(*captured_args: Any) -> Any:
            this = find_self()
            assert this is not None, "the model is gone, expected it to make this call"
            living = [module for find_module in modules if (module := find_module()) is not None]
            for module in this._leaves.show_hooks():
                if module not in before:
                    reason = (
                        f"a hook sits on the {type(module).__name__}, which does not run before the blocks only: "
                        "the calls run stock around the compiled blocks"
                    )
                    raise TailMismatch(with_place(reason, place_of_hook(this.model, module)))
            this.ledger.hooked = ""
            if on_meta:
                calls = this._meta_trunk.run(*this._arguments, rehearsed)
                if this.ledger.hooked:
                    raise TailMismatch(this.ledger.hooked)
            else:
                with this._sharding.hooks_shown():
                    calls = this._trunk.run(*this._arguments, num_calls, wanted, judge)
            this.ledger.begin(MODEL_REGION)
            others = [captured_args[index] for index in placeholders]
            output = this._sharding.run(living, values_of(calls), lambda *values: call(*values, *others))
            wrap = this._sharding.find_wrapper(living)
            return output if wrap is None else put_through(wrap, output)

        return run


def form_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what tells kinds of calls apart: the type and rank of each argument given, of a switch its position."""

    def form(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.ndim
        return value if isinstance(value, bool | str) else type(value).__name__

    return tuple(map(form, args)), tuple((name, form(value)) for name, value in sorted(kwargs.items()))


def is_leaf(node: fx.Node) -> bool:
    """Return whether `node` is the call of a block that was left uncaptured."""
    return node.op == "call_function" and getattr(node.target, "fxopt_leaf", False)
