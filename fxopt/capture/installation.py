"""Install fxopt in a model's compile slots and take it out again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import fx, nn

from fxopt.capture import torch_dynamo, torch_modules, torch_settings, torch_stand_ins, torch_tensors
from fxopt.capture.agreement import Agreement
from fxopt.capture.cache import Cache
from fxopt.capture.checkpointing import Checkpointing
from fxopt.capture.cuda_graphs import CudaGraphs, find_obstacle
from fxopt.capture.dispatch import BlockCalls
from fxopt.capture.engines import check_spread, inside_engine
from fxopt.capture.gradients import keep_stock_gradients
from fxopt.capture.ledger import Ledger
from fxopt.capture.libraries import find_doubts
from fxopt.capture.lowering import Lowering, has_fixed_sizes
from fxopt.capture.model_call import ModelCall, is_leaf
from fxopt.capture.modules import walk
from fxopt.capture.offload import make_offloader
from fxopt.capture.orders import GradientOrder, order_of
from fxopt.capture.patched import find_patched
from fxopt.capture.planning import Mark, Planner, note_held, with_mark
from fxopt.capture.reasons import reason_of_break
from fxopt.capture.recorders import collect_outputs
from fxopt.capture.regions import Regions, find_regions
from fxopt.capture.scores import find_outside_loss
from fxopt.capture.segments import compile_model_graph, find_segments
from fxopt.capture.sharing import share_mappings
from fxopt.capture.shortage import Shortage
from fxopt.capture.slot import Slot, find_caller
from fxopt.capture.tail import cut_tail
from fxopt.capture.torch_distributed import is_first_fsdp
from fxopt.capture.torch_modes import check_modes
from fxopt.capture.torch_modules import SLOT
from fxopt.errors import FxoptError
from fxopt.report.records import MODEL_REGION

log = logging.getLogger("fxopt")
AFTER_BLOCKS = "what stands after the blocks"


class Transform(Protocol):
    """The passes, as the pipeline gives them: rewrite `gm` in place and return what was done."""

    def __call__(self, gm: fx.GraphModule, *, region: str, lazy_outputs: bool) -> Any:
        """Run all passes over `gm`."""
        ...


class Installation:
    """fxopt in one model: its regions, what they compiled, and what happened while they ran."""

    def __init__(
        self,
        model: nn.Module,
        options: Any,
        transform: Transform,
        lower: Lowering,
        *,
        partial: bool,
        planner: Planner | None = None,
        replayed: bool = False,
    ) -> None:
        self.model = model
        self.options = options
        self.regions: Regions = find_regions(model)
        self.ledger = Ledger()
        self._order = GradientOrder(model, self.ledger)
        for line in (*find_patched(model), *find_doubts(model)):
            self.ledger.note(line)
        self._settings = torch_settings.make_capture_settings()
        self._transform = _unhooked(transform)
        self._lower = lower
        self.planner = planner
        self.offloader = None if planner is None else make_offloader(planner, self._tell)
        self._calls: dict[str, BlockCalls] = {}
        blocks = dict(self.regions.blocks)
        self.cache = Cache(model, self.ledger)
        self.checkpointing = checkpointing = Checkpointing(blocks.values(), planned=planner is not None)
        obstacle = find_obstacle(model) if replayed and options.lowering != "plain" else ""
        self.cuda_graphs = CudaGraphs(obstacle, self.ledger.note)
        if blocks:
            self.model_call: ModelCall | None = ModelCall(
                self.ledger,
                model,
                blocks,
                self._compile_model,
                self._compile_behind,
                checkpointing,
                self.cuda_graphs,
                self.cache,
            )
        else:
            self.model_call = None
        if self.offloader is not None and self.model_call is not None:
            self.model_call.note_begin = self.offloader.begin
        if planner is not None and self.model_call is not None:
            self.model_call.shortage = Shortage(model, planner, self.ledger, checkpointing)
        sizes = {stack.path: len(stack.blocks) for stack in self.regions.stacks} or {MODEL_REGION: 1}
        for region, num_blocks in sizes.items():
            self._calls[region] = BlockCalls(
                self.ledger,
                region,
                functools.partial(self._block_backend, region),
                checkpointing,
                self.cuda_graphs,
                partial=partial,
                planner=planner,
                num_blocks=num_blocks,
            )
            self._calls[region].note_end = self._order.note_late

    def install(self) -> None:
        """Fill the compile slots of the model and its blocks."""
        for stack in self.regions.stacks:
            for path, block in zip(stack.paths, stack.blocks, strict=True):
                block.__dict__[SLOT] = self._make_leaf(self._calls[stack.path], path, block)
        if self.model_call is not None:
            self.model_call.share = self._share_mappings
            self.model_call.collect = self._collect_outputs
            root: Callable[..., Any] = self.model_call.run
        else:
            root = self._root_as_region
        blocks = (block for _, block in self.regions.blocks)
        agreement = Agreement(self.model, blocks, self.options, self.planner)
        self.model.__dict__[SLOT] = Slot(self, root, agreement, self._order)

    def _share_mappings(self) -> None:
        """Make the leaves see through mappings that blocks hand on; each then costs guards of its own per call."""
        assert self.model_call is not None
        self._wrap_leaves(functools.partial(share_mappings, stand_ins=self.model_call.stand_ins))

    def _collect_outputs(self) -> None:
        """Make the leaves hand on what transformers collects inside their blocks; this costs guards as well."""
        self._wrap_leaves(collect_outputs)

    def _wrap_leaves(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        for _, block in self.regions.blocks:
            if _installation_in(block) is self:
                leaf: Any = wrap(block.__dict__[SLOT])
                leaf.fxopt_installation = weakref.ref(self)
                block.__dict__[SLOT] = leaf

    def _tell(self, text: str) -> None:
        if text not in self.ledger.notes:
            log.warning("%s", text)
        self.ledger.note(text)

    def remove(self) -> None:
        """Empty the compile slots again, but for what others put there since; nothing else was changed."""
        for module in (self.model, *(block for _, block in self.regions.blocks)):
            if _installation_in(module) is self:
                del module.__dict__[SLOT]

    def guards_of(self, region: str) -> tuple[str, ...]:
        """Return the conditions under which the captures of `region` hold."""
        calls = self._calls.get(region) or self.model_call
        frames = () if calls is None else calls.frames
        return tuple(guard for frame in frames for guard in torch_dynamo.guards_of(frame))

    def find_replaced(self) -> tuple[str, ...]:
        """Return the paths of the blocks, "" for the model, whose compile slot somebody else has filled since."""
        return tuple(
            path
            for path, module in (("", self.model), *self.regions.blocks)
            if module.__dict__.get(SLOT) is not None and _installation_in(module) is not self
        )

    def find_lost(self) -> tuple[str, ...]:
        """Return the paths of the blocks that are in the model no longer: taken out, or others put in their places."""
        there = walk(self.model)
        return tuple(path for path, block in self.regions.blocks if block not in there)

    def is_taken_out(self, path: str) -> bool:
        """Return whether nothing stands in for the lost block at `path`: no module, or a block that moved there."""
        try:
            found = self.model.get_submodule(path)
        except AttributeError:
            return True
        return any(found is block for _, block in self.regions.blocks)

    def _root_as_region(self, *args: Any, **kwargs: Any) -> Any:
        run = self._calls[MODEL_REGION].begin(MODEL_REGION, self.model)
        with torch_settings.capture_scope(self._settings):
            if not torch.is_grad_enabled():
                return run(*args, **kwargs)
            with self.cache.switched_off(kwargs):
                return run(*args, **self.cache.declined(kwargs))

    def _make_leaf(self, calls: BlockCalls, path: str, block: nn.Module) -> Callable[..., Any]:
        model_call = self.model_call
        assert model_call is not None

        def call_block(*args: Any, **kwargs: Any) -> Any:
            caller = next(
                (found for depth in (1, 2, 3) if (found := find_caller(sys._getframe(depth)))), None
            )
            if caller is not None and caller is not block:
                return torch_modules.stock_call(caller, *args, **kwargs)
            if torch_dynamo.is_recorded():
                return torch_modules.stock_call(block, *args, **kwargs)
            if torch_stand_ins.holds_fake(args, kwargs):
                return model_call.stand_ins.call(block, args, kwargs)
            return model_call.call_block(block, calls.begin(path, block), args, kwargs)

        call_block.fxopt_leaf = True  # pyright: ignore[reportFunctionMemberAccess]
        call_block.fxopt_installation = weakref.ref(self)  # pyright: ignore[reportFunctionMemberAccess]
        return torch_dynamo.mark_leaf(call_block)

    def _block_backend(self, region: str, mark: Mark | None, graphed: bool) -> Callable[..., Any]:
        stacks = {
            stack.path: f"{stack.path or 'the blocks'} ({len(stack.paths)} blocks)"
            for stack in self.regions.stacks
        }
        name, progress = stacks.get(region, region), self.ledger.progress
        if mark is not None:
            mark = dataclasses.replace(mark, offload=self.offloader and weakref.proxy(self.offloader))

        def compile_block(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            check_spread(example_inputs)
            check_modes(gm)
            number = f"capture {1 + sum(capture.region == region for capture in self.ledger.captures)}"
            progress.show(name, f"{number}, rewriting and proving")
            outcome = self._transform(gm, region=region, lazy_outputs=False)
            block = dict(self.regions.blocks).get(self.ledger.current, self.model)
            order = order_of(example_inputs, block)
            capture = self.ledger.add_capture(region, outcome, reason_of_break(gm), order)
            if torch_dynamo.changes_python_state(but=self._calls[region].notes.noted):
                self.ledger.changes_state = True
            progress.show(name, f"{number}, compiling")
            note_held(gm, example_inputs, self.model)
            lower = with_mark(self._lower, mark)
            if graphed and has_fixed_sizes(example_inputs):
                lower = self.cuda_graphs.with_replays(lower, region)
            elif graphed:
                self.cuda_graphs.refuse(f"{region} is compiled for lengths that change")
            compiled = keep_stock_gradients(lower, region)(gm, example_inputs)
            progress.done(name)
            ledger, planner = self.ledger, None if mark is None else self.planner
            form = None if planner is None else planner.form_of(ledger.current)

            def run(*args: Any) -> Any:
                ledger.serve(capture)
                if planner is not None:
                    planner.note_form(ledger.current, form)
                return compiled(*args)

            return run

        return compile_block

    def _compile_model(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        assert self.model_call is not None
        tail = cut_tail(gm, is_leaf)
        given = [example_inputs[index] for index in tail.placeholders]
        leaves = [node for node in tail.graph.graph.nodes if node.op == "placeholder"][: len(tail.leaves)]
        values = [node.meta["example_value"] for node in leaves]
        return self.model_call.compile_tail(tail, self._compile_tail(tail.graph, values, given))

    def _compile_behind(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        assert self.model_call is not None
        # What is captured before the backbone ends with its call.
        broken = reason_of_break(gm) if self.model_call.behind.is_after else ""
        return self._compile_tail(gm, [], example_inputs, broken)

    def _compile_tail(
        self, gm: fx.GraphModule, values: list[Any], given: list[Any], broken: str = ""
    ) -> Callable[..., Any]:
        """Return what runs `gm`, which stands after the blocks; it takes `values` of theirs and what Dynamo gave.

        `broken` says why the graph ends before the model's forward does.
        """
        assert self.model_call is not None
        check_spread(given)
        check_modes(gm)
        outside = find_outside_loss(gm, self.model) if self.model.training and not broken else ""
        if outside:
            self.ledger.note(outside)
        progress = self.ledger.progress
        progress.show(AFTER_BLOCKS, "rewriting and proving")
        outcome = self._transform(gm, region=MODEL_REGION, lazy_outputs=self.model.training)
        capture = self.ledger.add_capture(MODEL_REGION, outcome, broken, order_of(given, self.model))
        examples = [*values, *given]
        segments = find_segments(gm)
        if segments.unkept:
            self.ledger.note(f"logits are computed at every step: after the blocks {segments.write}")
        progress.show(AFTER_BLOCKS, "compiling")
        note_held(gm, examples, self.model)
        planner, mark, shortage = self.planner, None, self.model_call.shortage
        if planner is not None and shortage is not None and shortage.begin_tail():
            planner.begin_tail()
            mark = Mark(planner.read_tail, decides=False)
        lower = keep_stock_gradients(with_mark(self._lower, mark), MODEL_REGION)
        call = compile_model_graph(gm, examples, lower, segments)
        progress.done(AFTER_BLOCKS)
        ledger = self.ledger

        def run(*args: Any) -> Any:
            ledger.serve(capture)
            ledger.refused.pop(MODEL_REGION, None)
            return call(*args)

        return run


def _unhooked(transform: Transform) -> Transform:
    """Return `transform` so that hooks on saved tensors see nothing of it.

    It runs in the model's first step, its proofs with gradients: checkpointing would count what these save, and
    find less when it recomputes; `save_on_cpu` would move it.
    """

    def run(gm: fx.GraphModule, *, region: str, lazy_outputs: bool) -> Any:
        with torch_tensors.hooks_left_out():
            return transform(gm, region=region, lazy_outputs=lazy_outputs)

    return run


def find_installation(model: nn.Module) -> Installation | None:
    """Return what is installed in `model`, or in some module of it, or None.

    A copy of an optimized model has nothing installed. What is installed may be another model's: one that
    was put into `model` since (an adapter's base), or one that `model` was taken out of (adapters merged).
    """
    slots = [module for module in walk(model) if SLOT in module.__dict__]
    return next((found for module in slots if (found := _installation_in(module)) is not None), None)


def _installation_in(module: nn.Module) -> Installation | None:
    slot = module.__dict__.get(SLOT)
    if isinstance(slot, Slot):
        return slot.installation
    find: Callable[[], Installation | None] = getattr(slot, "fxopt_installation", lambda: None)
    return find()


@contextlib.contextmanager
def slots_emptied(model: nn.Module) -> Iterator[None]:
    """Empty the compile slots of all modules of `model` within the scope, whoever filled them."""
    filled = {module: module.__dict__.pop(SLOT) for module in walk(model) if SLOT in module.__dict__}
    try:
        yield
    finally:
        for module, slot in filled.items():
            module.__dict__[SLOT] = slot


def check_model(model: object) -> nn.Module:
    """Return `model` if it is a module; of DistributedDataParallel the model inside.

    Raises:
        FxoptError: not a module, one of TorchScript, one with lazy layers that were never called, or the wrapper that
            torch.compile or the first FSDP returns.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise FxoptError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}\n"
            "pass the model object itself, e.g. AutoModelForCausalLM.from_pretrained(...)"
        )
    if isinstance(model, torch_modules.OptimizedModule):
        raise FxoptError(
            "model: already under torch.compile, expected the model itself\n"
            "pass model._orig_mod: explain reads it, and optimize takes the place of torch.compile"
        )
    model = inside_engine(model)
    if is_first_fsdp(model):
        raise FxoptError(
            "model: got FullyShardedDataParallel, which flattens parameters, expected one sharded by fully_shard\n"
            "use torch.distributed.fsdp.fully_shard on each block and on the model"
        )
    named = (*model.named_parameters(), *model.named_buffers())
    unmade = next((name for name, tensor in named if nn.parameter.is_lazy(tensor)), None)
    if unmade is not None:
        raise FxoptError(
            f"model: {unmade} of {type(model).__name__} has no shape yet, expected weights that are made\n"
            "call the model once first: lazy layers take their sizes from what they are given"
        )
    return model


def check_on_device(model: nn.Module) -> nn.Module:
    """Return `model` if no parameter or buffer of it is on the meta device.

    Raises:
        FxoptError: one is; where not all are, the text names it.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in named if tensor.is_meta]
    if missing:
        some = (
            f"{missing[0]} of {type(model).__name__}" if len(missing) < len(named) else type(model).__name__
        )
        raise FxoptError(
            f"model: {some} is on the meta device, expected weights on a real device\n"
            "load or initialize the weights first; fxopt.explain(model) works on meta"
        )
    return model


def check_uncompiled(model: nn.Module) -> None:
    """Check that nobody but fxopt compiles `model` or a module of it.

    Raises:
        FxoptError: torch.compile or module.compile() holds one of them.
    """
    for module, path in walk(model).items():
        by = ""
        if isinstance(module, torch_modules.OptimizedModule):
            by = "torch.compile"
        elif module.__dict__.get(SLOT) is not None and _installation_in(module) is None:
            by = "module.compile()"
        if by:
            raise FxoptError(
                f"model: {path or 'the model'} ({type(module).__name__}) is already compiled by {by}, "
                "expected stock modules\noptimize the outermost model once, before any compile()"
            )
