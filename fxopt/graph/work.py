"""What a graph launches and keeps in one training pass, run forward and backward on tensors without storage."""

from __future__ import annotations

import contextlib
import logging
import operator
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks

from fxopt.graph.node_records import find_lazy
from fxopt.graph.sizes import number_of
from fxopt.graph.storage import key_of
from fxopt.graph.torch_private import (
    DispatchMode,
    FakeTensorMode,
    registered_name,
    schema_of,
    tree_leaves,
)
from fxopt.graph.view import results_of
from fxopt.report.records import Work

log = logging.getLogger("fxopt")
Autocast = tuple[str, torch.dtype, bool]


def kept_for_work(gm: fx.GraphModule) -> Callable[[], fx.GraphModule]:
    """Return what makes a module of `gm` and the bodies of its higher-order ops as they are now.

    Only nodes are copied at once: modules, whose code is generated, are made for reports that somebody reads.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    held: dict[str, Any] = {}
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op in ("get_attr", "call_module"):
            held[str(node.target)] = operator.attrgetter(str(node.target))(gm)
    bodies = {name: kept_for_work(item) for name, item in held.items() if isinstance(item, fx.GraphModule)}
    return lambda: fx.GraphModule({**held, **{name: make() for name, make in bodies.items()}}, graph)


def ambient_autocast() -> tuple[Autocast, ...]:
    """Return the autocast state of this thread, under which a graph that is captured now will run."""
    return tuple(
        (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        for device in ("cpu", "cuda")
        if torch.amp.is_autocast_available(device)  # pyright: ignore[reportPrivateImportUsage]
    )


def measure_work(gm: fx.GraphModule, autocast: Sequence[Autocast] = ()) -> Work | None:
    """Return what `gm` launches and saves under `autocast`, each op run by itself; None where it cannot be run so.

    What is computed only where somebody reads it is left out. It runs in a thread of its own: a graph that fails
    between two switches of a mode leaves the modes of this thread as they are.
    """
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(_measure_under, gm, autocast).result()
        except Exception as error:
            log.debug("the work of a graph is not known: %s: %s", type(error).__name__, error)
            return None


@contextlib.contextmanager
def _quiet_fakes() -> Generator[None]:
    """Keep torch from logging, in this thread, a traceback for what does not run on tensors without storage."""
    fakes = logging.getLogger("torch._subclasses.fake_tensor")
    own = threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != own

    fakes.addFilter(is_of_others)
    try:
        yield
    finally:
        fakes.removeFilter(is_of_others)


def _measure_under(gm: fx.GraphModule, autocast: Sequence[Autocast]) -> Work:
    with _quiet_fakes(), torch.random.fork_rng(devices=[]), contextlib.ExitStack() as modes:
        for device, dtype, enabled in autocast:
            modes.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        return _measure(gm)


def _measure(gm: fx.GraphModule) -> Work:
    gm = kept_for_work(gm)()
    _drop_lazy(gm)
    gm.recompile()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        inputs = [_stand_in(node) for node in gm.graph.find_nodes(op="placeholder")]
        given = {key_of(value) for value in inputs if isinstance(value, Tensor)}
        saved: dict[int, Tensor] = {}

        def note(tensor: Tensor) -> Tensor:
            if key_of(tensor) not in given:
                saved.setdefault(key_of(tensor), tensor)
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor), _Launches() as forward:
            outputs = tree_leaves(_Run(gm).run(*inputs))
        roots = [out for out in outputs if isinstance(out, Tensor) and out.requires_grad]
        wanted = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        seeds = [torch.ones_like(out) for out in roots]
        with _Launches() as backward:
            if roots and wanted:
                torch.autograd.grad(roots, wanted, seeds, allow_unused=True)
        size = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    return Work(forward.number, backward.number, size)


def _drop_lazy(gm: fx.GraphModule) -> None:
    """Take what runs only where somebody reads it out of `gm`, and out of what it returns."""
    lazy = find_lazy(gm.graph)
    (output,) = gm.graph.find_nodes(op="output")
    output.args = (tuple(None if result in lazy else result for result in results_of(gm)),)
    for node in reversed(gm.graph.nodes):
        if node in lazy:
            gm.graph.erase_node(node)


def _stand_in(node: fx.Node) -> Any:
    value: Any = node.meta["example_value"]
    if isinstance(value, torch.SymInt):
        return number_of(value)
    if not isinstance(value, Tensor):
        return value
    sizes, strides = ([number_of(size) for size in each] for each in (value.shape, value.stride()))
    made = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    return made.requires_grad_(value.requires_grad)


class _Run(fx.Interpreter):
    """Runs a graph; on the meta device, stock attention as the fused kernel that a device has for it.

    Torch itself takes the unfused form there, which keeps whole matrices of weights.
    """

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run one call."""
        if target is F.scaled_dot_product_attention and args[0].device.type == "meta":
            return _fused_attention(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(repeats, -3) for tensor in (key, value))
    if value.shape[-1] != query.shape[-1]:  # the one fused kernel that takes values of another width
        efficient: Any = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
    fused: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class _Launches(DispatchMode):
    """Counts the ops that run within it and write memory: on a device, each is one kernel or more."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        given = {key_of(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        made = {key_of(value) for value in tree_leaves(result) if isinstance(value, Tensor)}
        writes = bool(made - given) or (bool(made) and schema_of(op).is_mutable)
        self.number += writes and not registered_name(op).startswith(("prim::", "aten::empty"))
        return result
