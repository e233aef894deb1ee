"""Everything private of torch that fxopt touches, in one place.

`tests/fxopt/capture/test_torch_compat.py` fails in plain words when a torch version moves one of these.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch._dynamo as dynamo
from torch._C._dynamo import eval_frame
from torch._dynamo import config as dynamo_config
from torch._dynamo import exc as dynamo_exc
from torch._dynamo import funcname_cache
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew
from torch._dynamo.variables.dicts import ConstDictVariable
from torch._dynamo.variables.torch_function import TorchFunctionModeStackVariable
from torch._functorch import config as functorch_config
from torch._guards import TracingContext
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._logging._internal import log_state
from torch._subclasses import fake_tensor
from torch.fx.experimental import symbolic_shapes
from torch.nn.modules import module as nn_module
from torch.utils import _pytree as pytree

from fxopt.capture import joint_passes
from fxopt.capture.planning import Leaving, Mark, held_by_model, with_offload
from fxopt.capture.rehearsal import compile_kernels
from fxopt.errors import FxoptError, VerifyError
from fxopt.graph.view import results_of

RECOMPILE_LIMIT = 64
"""Captures one region of one model may have; Dynamo's own limit of 8 is met by a short training run."""

CAPTURE_ERRORS: tuple[type[Exception], ...] = (
    dynamo_exc.TorchDynamoException,
    dynamo_exc.FailOnRecompileLimitHit,
    symbolic_shapes.GuardOnDataDependentSymNode,
    symbolic_shapes.PendingUnbackedSymbolNotFound,
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
)
"""What Dynamo raises when it cannot capture, or lets through of the stand-in tensors it traces with; never an error of
the user's own code at run time."""

GIVEN = re.compile(r"L\['(args|kwargs)'\]\[[^\[\]]+\](\.data)?")
"""How Dynamo names a mapping among a captured block's arguments, and the dict inside a `UserDict`."""
_COPIES = itertools.count()
SLOT = "_compiled_call_impl"
"""Where `module.compile()` keeps what `module(...)` runs in place of `stock_call`; copies and pickles drop it."""
CALL = "_call_impl"
"""The method that `stock_call` is; where a module has its own, Dynamo goes through the slot."""
CALLER = "_wrapped_call_impl"
"""The code that reads the slot."""
FORWARD_HOOK_DICTS = ("_forward_pre_hooks", "_forward_hooks")
HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The hook dictionaries of a module that `Module._call_impl` looks at."""
CHILDREN = "_modules"
"""The dictionary of the modules right inside a module."""

stock_call = torch.nn.Module._call_impl
"""What `module(...)` runs when nothing is installed: hooks and `forward`."""


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


GUARD = re.compile(r"\+- ([A-Z][A-Z_]+): (.+?)(?:\s{2,}# .*)?$")


def guards_of(compiled: Callable[..., Any]) -> tuple[str, ...]:
    """Return the conditions under which what `compile_frame` made runs its captures, each once, in Dynamo's words."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    code = getattr(compiled, "fxopt_code", None)
    entries = _debug_get_cache_entry_list(code) if code is not None else ()
    lines = (line for entry in entries for line in str(entry.guard_manager).splitlines())
    return tuple(dict.fromkeys(f"{found[1]}: {found[2]}" for line in lines if (found := GUARD.search(line))))


OptimizedModule = dynamo.OptimizedModule
"""What torch.compile wraps around a module."""

without_torch_function = torch._C.DisableTorchFunctionSubclass
"""A scope in which functions of torch do not go through the `__torch_function__` of a subclass."""
with_torch_function = torch._C._EnableTorchFunction
"""A scope within that one in which they do again."""


def make_form(tensor_class: type[torch.Tensor], form: torch.Tensor, device: torch.device) -> Any:
    """Return a `tensor_class` without values, of shape, strides and dtype of `form`, said to be on `device`."""
    return torch.Tensor._make_wrapper_subclass(
        tensor_class, form.shape, strides=form.stride(), dtype=form.dtype, device=device
    )


def version_of(tensor: torch.Tensor) -> int:
    """Return how often `tensor` was written to."""
    return tensor._version


def children_of(module: torch.nn.Module) -> dict[str, torch.nn.Module | None]:
    """Return the modules right inside `module` by name, without the generator that `named_children` is."""
    return module._modules


def own_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield the parameters and buffers of `module` itself."""
    for own in (module._parameters, module._buffers):
        yield from (value for value in own.values() if value is not None)


def carries_hooks(module: torch.nn.Module) -> bool:
    """Return whether any hook, idle ones too, is on `module` itself."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


LOG_METHODS = ("debug", "info", "warning", "error", "log", "warning_once", "info_once", "warning_advice")
"""Methods of loggers, transformers' own among them; a log line breaks a capture, so under capture it says nothing."""


class FunctionSet(str):
    """A set of functions that is a text to JSON: torch before 2.13 writes its settings into a log, and fails
    with a traceback per capture where one is a `set` of functions."""

    functions: frozenset[Callable[..., Any]]

    def __new__(cls, functions: Iterable[Callable[..., Any]]) -> FunctionSet:
        """Return the set of `functions`."""
        members = frozenset(functions)
        made = super().__new__(cls, f"{len(members)} functions")
        made.functions = members
        return made

    def __contains__(self, item: object) -> bool:
        return item in self.functions

    def __iter__(self) -> Iterator[Any]:
        return iter(self.functions)


def make_capture_settings() -> dict[str, Any]:
    """Return Dynamo's settings for fxopt's calls: raised capture limits, and log lines passed over.

    Under DistributedDataParallel Dynamo would cut each graph at gradient buckets: blocks are small enough for the
    reductions to begin early, and cut, their patterns are lost. Under FSDP2 it would leave out guards on parameters
    and attributes, by which blocks that share a frame are told apart.
    """
    methods = {getattr(logging.Logger, name) for name in LOG_METHODS if hasattr(logging.Logger, name)}
    return {
        "recompile_limit": RECOMPILE_LIMIT,
        "accumulated_recompile_limit": RECOMPILE_LIMIT * 64,
        "optimize_ddp": False,
        "skip_fsdp_guards": False,
        "ignore_logging_functions": FunctionSet(methods.union(dynamo_config.ignore_logging_functions)),
    }


FUNCTION_NAMES = funcname_cache.cache
"""What Dynamo keeps of the functions' names in each file; threads may enter and leave scopes in any order."""


class NoNames(dict[str, dict[int, str]]):
    """What stands in for that: no names, and no file has to be read for them."""

    def __contains__(self, filename: object) -> bool:
        return True

    def __missing__(self, filename: str) -> dict[int, str]:
        return {}


@contextlib.contextmanager
def capture_scope(settings: dict[str, Any]) -> Iterator[None]:
    """Put `settings` of Dynamo in force within the scope.

    Dynamo makes the head of a log line for each call that it puts into a graph, also where nobody reads the log, and
    tokenizes whole files for the functions' names in it: 0.7 s of a first step, which are spared.
    """
    with dynamo_config.patch(settings):
        if not is_artifact_logged("trace_call"):
            funcname_cache.cache = NoNames()
        try:
            yield
        finally:
            funcname_cache.cache = FUNCTION_NAMES


def is_artifact_logged(name: str) -> bool:
    """Return whether `TORCH_LOGS` asks for what torch calls an artifact by this name."""
    return log_state.is_artifact_enabled(name)


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


def is_fake(value: object) -> bool:
    """Return whether `value` is a stand-in tensor, as Dynamo uses while it traces."""
    return isinstance(value, torch._subclasses.FakeTensor)


def holds_fake(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether the tensors among these arguments, at any depth, are stand-ins; they all are, or none is."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return is_fake(value)
    return any(is_fake(leaf) for leaf in pytree.tree_leaves((args, kwargs)))


def fake_mode_of(value: Any) -> Any:
    """Return the FakeTensorMode that the stand-in tensor `value` belongs to."""
    return value.fake_mode


def make_stand_in(mode: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Return a stand-in of `mode` for `tensor` that carries what was set on it (a packed weight's scales)."""
    stand_in = mode.from_tensor(tensor, static_shapes=True)
    for name, value in tensor.__dict__.items():
        stand_in.__dict__.setdefault(name, value)
    return stand_in


def make_whole_stand_in(mode: Any, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a stand-in of `mode` for the whole of a `tensor` that is spread over ranks."""
    with mode:
        whole = torch.empty(tuple(tensor.shape), dtype=dtype, device=tensor.device)
    return whole.requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def real_tensors_allowed(mode: Any) -> Iterator[None]:
    """Let ops of `mode` read real tensors beside stand-ins within the scope, and drop the sizes made up in it.

    A size that hangs on values is a new symbol; torch asks for each in what is returned, unless told otherwise.
    """
    previous, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        with mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env else contextlib.nullcontext():
            yield
    finally:
        mode.allow_non_fake_inputs = previous


@contextlib.contextmanager
def stand_ins_left() -> Iterator[None]:
    """Compute with real tensors within the scope, while Dynamo traces with stand-ins around it."""
    with fake_tensor.unset_fake_temporarily():
        yield


def _named_parameters(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(module).named_parameters(module, *args, **kwargs)


def _named_buffers(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(module).named_buffers(module, *args, **kwargs)


@contextlib.contextmanager
def tensors_left_unlisted(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Keep Dynamo from listing the parameters and buffers below each of `modules` that it meets, within the scope.

    It does so for each module that holds the layers, for names and the addresses that CUDA graphs need: a fourth of
    what one more layer costs. It passes over a module whose methods are not `nn.Module`'s own; these do the same.
    """
    changed = [module for module in modules if "named_parameters" not in module.__dict__]
    for module in changed:
        module.__dict__["named_parameters"] = types.MethodType(_named_parameters, module)
        module.__dict__["named_buffers"] = types.MethodType(_named_buffers, module)
    try:
        yield
    finally:
        for module in changed:
            module.__dict__.pop("named_parameters", None)
            module.__dict__.pop("named_buffers", None)


def changes_python_state() -> bool:
    """Return whether the frame that Dynamo is compiling right now changes objects that were there before it.

    To be asked by a backend, while Dynamo calls it. Mappings among its arguments do not count: what is put into
    these is seen where the model is captured. Nor do modes, which `with` leaves as they were.
    """
    effects = InstructionTranslator.current_tx().output.side_effects
    new = (AttributeMutationNew, ValueMutationNew)
    return any(
        not isinstance(item, TorchFunctionModeStackVariable)
        and not isinstance(item.mutation_type, new)
        and effects.is_modified(item)
        and not _is_given_mapping(item)
        for item in effects.id_to_variable.values()
    )


def _is_given_mapping(item: Any) -> bool:
    if not isinstance(item, ConstDictVariable) or item.source is None:
        return False
    name = item.source.name() if callable(item.source.name) else item.source.name
    return GIVEN.fullmatch(name) is not None


def is_compiled_node(node: object) -> bool:
    """Return whether `node` is the autograd node of one call of a graph that AOTAutograd compiled."""
    return type(node).__name__ == "CompiledFunctionBackward"


def writes_to(tensor: torch.Tensor) -> int:
    """Return how often `tensor` or a view of it has been written to in place."""
    return tensor._version


def can_hook_saved_tensors() -> bool:
    """Return whether hooks on saved tensors may be set now, and gradients are recorded."""
    autograd: Any = getattr(torch._C, "_autograd")  # noqa: B009
    return torch.is_grad_enabled() and autograd._saved_tensors_hooks_is_enabled()


def top_saved_tensors_hooks() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Return the hooks on saved tensors that are in force, or None; those set within take their place."""
    autograd: Any = getattr(torch._C, "_autograd")  # noqa: B009
    return autograd._top_saved_tensors_default_hooks(True)


def is_switched_off() -> bool:
    """Return whether Dynamo captures nothing in this process, by its settings or `TORCH_COMPILE_DISABLE`."""
    return bool(dynamo_config.disable)


def is_recorded() -> bool:
    """Return whether `torch.export` or `torch.jit.trace` is recording what runs right now."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


copy_each: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
"""Copies each tensor of the second list into that of the first, in few launches."""


def packs_saved_tensors() -> bool:
    """Return whether what autograd saves right now goes to hooks: checkpointed, or kept elsewhere."""
    return top_saved_tensors_hooks() is not None


def num_unrecorded() -> int:
    """Return how many compiled graphs Inductor declined to record as CUDA graphs, in this process."""
    return dynamo.utils.counters["inductor"]["cudagraph_skips"]


def has_global_hooks() -> bool:
    """Return whether hooks for all modules of the process are registered."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def root_cause(error: BaseException) -> BaseException:
    """Return the innermost error that `error` wraps or was raised for."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    return error


def cause_to_raise(error: BaseException) -> BaseException | None:
    """Return the mistake of the user or of a pass that `error` wraps, or None: Dynamo could not capture."""
    cause = root_cause(error)
    return cause if isinstance(cause, FxoptError | VerifyError) else None


def is_of_backend(error: BaseException) -> bool:
    """Return whether `error` says that what Dynamo gave a captured graph to has failed."""
    return isinstance(error, dynamo_exc.BackendCompilerFailed)


def hangs_on_values(error: BaseException) -> bool:
    """Return whether `error` says that something could not be compiled since its sizes hang on values."""
    return isinstance(root_cause(error), symbolic_shapes.GuardOnDataDependentSymNode)


def find_break(gm: torch.fx.GraphModule) -> tuple[str, list[str]] | None:
    """Return why `gm` ends before the frame it was captured from does, and the stack there, or None."""
    cause: Any = getattr(gm, "compile_subgraph_reason", None)
    if cause is None or not cause.graph_break:
        return None
    return cause.reason, [f'File "{frame.filename}", line {frame.lineno}' for frame in cause.user_stack]


def allow_other_strides(gm: torch.fx.GraphModule) -> None:
    """Make each view of an AOT graph copy where an op gave its result other strides than it had said it would.

    Some of torch's backward ops do (softplus on a transposed gradient), and `aten.view` raises then. The graph
    is functional, so a copy has the same values.
    """
    views = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)
    for node in views:
        node.target = torch.ops.aten.reshape.default
    if views:
        gm.recompile()


def _donate_nothing() -> None:
    """Say of the graphs being compiled that backward overwrites none of what forward saved, so that it may run twice.

    AOTAutograd allows it to, and then refuses `retain_graph=True`; nodes that run one by one never do.
    """
    context = TracingContext.try_get()
    if context is not None and context.fw_metadata is not None:
        context.fw_metadata.bw_donated_idxs = []


def plain_backend(
    gm: torch.fx.GraphModule, example_inputs: list[Any], mark: Mark | None = None, *, graphed: bool = False
) -> Callable[..., Any]:
    """Return `gm` made into a differentiable callable by AOTAutograd and run node by node, never `graphed`."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.partitioners import default_partition

    def run_nodes(graph: torch.fx.GraphModule, _: Any) -> Any:
        allow_other_strides(graph)
        _donate_nothing()
        return make_boxed_func(graph.forward)

    held, leaving = held_by_model(gm), Leaving()

    def run_forward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        leaving.read(graph.graph)
        return run_nodes(graph, inputs)

    def partition(joint: torch.fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        joint_passes.prepare_joint(joint.graph, mark, held)
        return default_partition(joint, joint_inputs, **options)

    compile_graph = aot_autograd(fw_compiler=run_forward, bw_compiler=run_nodes, partition_fn=partition)
    return with_offload(compile_graph(gm, example_inputs), mark, leaving)


def trace_joint(
    gm: torch.fx.GraphModule, example_inputs: list[Any], mark: Mark | None = None, *, decomposed: bool = False
) -> Callable[..., Any]:
    """Show `mark` the joint graph of `gm`, `decomposed` as Inductor would have it; what is returned saves nothing."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.partitioners import default_partition
    from torch._inductor.decomposition import select_decomp_table

    held = held_by_model(gm)

    def partition(joint: torch.fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        joint_passes.prepare_joint(joint.graph, mark, held)
        return default_partition(joint, joint_inputs, **options)

    def run_nodes(graph: torch.fx.GraphModule, _: Any) -> Any:
        return make_boxed_func(graph.forward)

    table = {"decompositions": select_decomp_table()} if decomposed else {}
    aot_autograd(fw_compiler=run_nodes, bw_compiler=run_nodes, partition_fn=partition, **table)(
        gm, example_inputs
    )
    results = results_of(gm)

    def run(*args: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            values = gm.forward(*args)
        return tuple(map(_with_gradient, values, results))

    return run


def _with_gradient(value: Any, node: Any) -> Any:
    """Return a value computed without gradients so that it requires one where the value of `node` does."""
    example = node.meta.get("example_value") if isinstance(node, torch.fx.Node) else None
    if not isinstance(value, torch.Tensor) or not isinstance(example, torch.Tensor):
        return value
    return value.detach().requires_grad_(example.requires_grad)


def share_kernel_cache(device: torch.device) -> None:
    """Name the folder of compiled kernels that Inductor will name, unless the user did.

    Inductor does so at its first kernel: what was compiled before would be in another folder, and compiled again in
    each process.
    """
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index or 0))


def load_inductor() -> None:
    """Load Triton's driver for the current device and Inductor's modules, and start its compiling processes."""
    from triton.runtime import driver

    driver.active.get_current_target()
    import torch._inductor.compile_fx as compile_fx
    from torch._inductor.async_compile import AsyncCompile

    assert callable(compile_fx.compile_fx)
    AsyncCompile.wakeup()


def inductor_backend(
    gm: torch.fx.GraphModule, example_inputs: list[Any], mark: Mark | None = None, *, graphed: bool = False
) -> Callable[..., Any]:
    """Return `gm` compiled by Inductor, with the model's rounding points kept; `graphed` by CUDA graphs.

    A plan is made when the joint graph is seen, so that has to be made anew in each process; what is compiled of
    it still comes from Inductor's cache.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    leaving = Leaving()

    def compile_and_read(graph: torch.fx.GraphModule, *inputs: Any, **how: Any) -> Any:
        if not how.get("is_backward", False):
            leaving.read(graph.graph)
        return compile_fx_inner(graph, *inputs, **how)

    patches = {
        "emulate_precision_casts": True,
        "joint_custom_pre_pass": JointPasses(mark, held_by_model(gm)),
        "triton.cudagraphs": graphed,
    }
    if graphed:
        patches["graph_partition"] = False  # a graph is replayed whole, or not at all
    caching = {} if mark is None else {"enable_autograd_cache": False}
    with functorch_config.patch(caching):
        inner: Any = compile_fx_inner if mark is None else compile_and_read
        compiled: Any = compile_fx(gm, example_inputs, inner, config_patches=patches)
    return with_offload(compiled, mark, leaving)


class JointPasses(CustomGraphPass):
    """fxopt's passes over the joint graph, as Inductor takes them; `mark` tags it for a plan."""

    def __init__(self, mark: Mark | None = None, held: frozenset[int] = frozenset()) -> None:
        self._mark = mark
        self._held = held
        self._plan = ""

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Run the passes over `graph`."""
        self._plan = joint_passes.prepare_joint(graph, self._mark, self._held)
        compile_kernels(graph)

    def uuid(self) -> bytes:
        """Return what Inductor's caches know these passes by; without it every process compiles anew."""
        return f"fxopt.JointPasses.5{self._plan}".encode()
