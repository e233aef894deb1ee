"""What is private of AOTAutograd and Inductor: a captured graph made into something that runs.

`tests/fxopt/capture/test_torch_lowering.py` fails in plain words when a torch version moves one of these.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as functorch_config
from torch._guards import TracingContext
from torch._inductor.custom_graph_pass import CustomGraphPass

from fxopt.capture import joint_passes
from fxopt.capture.caching import find_cacheable, source_digest
from fxopt.capture.in_place import write_in_place
from fxopt.capture.mutation import mark_readers, numbers_of_mutated
from fxopt.capture.planning import Leaving, Mark, held_by_model, with_offload
from fxopt.capture.rehearsal import compile_kernels
from fxopt.capture.unit_strides import spell_unit_dims
from fxopt.graph.view import results_of


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

    AOTAutograd allows it to, and then refuses `retain_graph=True`; nodes that run one by one never do. Nor may a graph
    whose values come back from the host: a gradient written over one would lie where the next ones land.
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

    spell_unit_dims(gm)
    held, mutated, leaving = held_by_model(gm), numbers_of_mutated(gm), Leaving()

    def run_forward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        leaving.read(graph.graph)
        return run_nodes(graph, inputs)

    def partition(joint: torch.fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        mark_readers(joint.graph, mutated)
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

    held, mutated = held_by_model(gm), numbers_of_mutated(gm)

    def partition(joint: torch.fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        mark_readers(joint.graph, mutated)
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


def cache_folder() -> Path:
    """Return the folder in which Inductor keeps what it compiled, and what fxopt keeps beside it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def load_inductor() -> None:
    """Load Triton's driver for the current device and Inductor's modules, and start its compiling processes."""
    from triton.runtime import driver

    driver.active.get_current_target()
    import torch._inductor.compile_fx as compile_fx
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codegen.common import init_backend_registration

    assert callable(compile_fx.compile_fx)
    AsyncCompile.wakeup()
    init_backend_registration()  # imports the code generators of all devices


def inductor_backend(
    gm: torch.fx.GraphModule, example_inputs: list[Any], mark: Mark | None = None, *, graphed: bool = False
) -> Callable[..., Any]:
    """Return `gm` compiled by Inductor, with the model's rounding points kept; `graphed` by CUDA graphs.

    What an earlier process compiled of the same graph comes from AOTAutograd's cache. A plan is made when the joint
    graph is seen, so that has to be made anew in each process; what is compiled of it still comes from Inductor's.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    leaving = Leaving()

    def compile_and_read(graph: torch.fx.GraphModule, *inputs: Any, **how: Any) -> Any:
        if not how.get("is_backward", False):
            leaving.read(graph.graph)
        if leaving.numbers:
            _donate_nothing()
        return compile_fx_inner(graph, *inputs, **how)

    patches: dict[str, Any] = {
        "emulate_precision_casts": True,
        "unsafe_marked_cacheable_functions": find_cacheable(gm),
        "joint_custom_pre_pass": JointPasses(mark, held_by_model(gm)),
        "post_grad_custom_post_pass": LastPasses(),
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
        self._casts = _autocast_dtypes()

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Run the passes over `graph`."""
        self._plan = joint_passes.prepare_joint(graph, self._mark, self._held)
        compile_kernels(graph)

    def uuid(self) -> bytes:
        """Return what Inductor's caches know these passes by; without it every process compiles anew.

        Autocast's dtypes are part of it: casts are not in the graph that the key of AOTAutograd's cache is made of,
        and before torch 2.13 a graph compiled under bfloat16 came back under float16.
        """
        return f"fxopt.JointPasses {source_digest()} {self._casts} {self._plan}".encode()


class LastPasses(CustomGraphPass):
    """fxopt's passes over a forward or a backward graph, after which nothing may take it to be functional."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Run the passes over `graph`."""
        write_in_place(graph)

    def uuid(self) -> bytes:
        """Return what Inductor's caches know these passes by."""
        return f"fxopt.LastPasses {source_digest()}".encode()


def _autocast_dtypes() -> dict[str, torch.dtype]:
    """Return what autocast now casts to, per kind of device where it is on."""
    kinds = {"cpu", *([found.type] if (found := torch.accelerator.current_accelerator()) else [])}
    return {kind: torch.get_autocast_dtype(kind) for kind in sorted(kinds) if torch.is_autocast_enabled(kind)}
