"""What is private of DeepSpeed: its modules, what its ZeRO engines put on parameters, and what they keep themselves.

Nothing of it is imported here: where nobody imported DeepSpeed, no model is under it.
`tests/distributed/test_deepspeed_private.py` fails in plain words when a version moves one of these.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fxopt.capture import torch_tensors
from fxopt.errors import FxoptError

MODULE_HOOKS = "deepspeed.runtime.zero.parameter_offload"
STAGE_3 = "deepspeed.runtime.zero.stage3"
STAGES_1_AND_2 = "deepspeed.runtime.zero.stage_1_and_2"
LINEAR = "deepspeed.runtime.zero.linear"
OUTPUT_HOOKS = "deepspeed.runtime.utils"

SHAPE, LEAF = "ds_shape", "_z3_leaf"
"""On a parameter that ZeRO-3 keeps, and on a module that it gathers with all inside."""
GROUPS = ("ds_process_group", "_dp_group")
"""Where ZeRO-3, and ZeRO-1 and ZeRO-2, put the process group on parameters."""
ENGINE_3 = "_z3_optimizer"
"""Where a parameter has the engine of ZeRO-3 that trains it."""
MASTERS_LINK = "_hp_mapping"
"""Where one has its part of what ZeRO-1 and ZeRO-2 train in its place."""
TESTED = "0.19.8"


class MovedError(FxoptError):
    """A version of DeepSpeed has something elsewhere than fxopt looks for it."""


def read(holder: object, name: str) -> Any:
    """Return the attribute `name` of something of DeepSpeed's.

    Raises:
        MovedError: there is none.
    """
    try:
        return getattr(holder, name)
    except AttributeError:
        version = getattr(sys.modules.get("deepspeed"), "__version__", "of an unknown version")
        kind = getattr(holder, "__name__", None) or type(holder).__name__
        raise MovedError(
            f"DeepSpeed {version}: {kind} has no {name}, expected as in {TESTED}\n"
            f"install deepspeed=={TESTED}, or report this version"
        ) from None


def is_of(function: Any, name: str) -> bool:
    """Return whether `function` stands in the module `name`."""
    source = sys.modules.get(name)
    return source is not None and getattr(function, "__globals__", None) is vars(source)


def is_linear(function: Any) -> bool:
    """Return whether `function` is what ZeRO-3 puts in the place of `torch.nn.functional.linear`."""
    engine = sys.modules.get(LINEAR)
    return engine is not None and function is read(engine, "zero3_linear_wrap")


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Return whether ZeRO-3 keeps a part of `tensor` on each rank."""
    return MODULE_HOOKS in sys.modules and hasattr(tensor, SHAPE)


def num_items(parameter: Any) -> int:
    """Return how many items a parameter that ZeRO-3 keeps has while it is gathered."""
    return read(parameter, "ds_numel")


def stays_gathered(parameter: Any) -> bool:
    """Return whether ZeRO-3 keeps a parameter gathered, for it is small."""
    return read(parameter, "ds_persist")


def shard_of(parameter: Any) -> torch.Tensor:
    """Return the part of a parameter that ZeRO-3 keeps on this rank."""
    return read(parameter, "ds_tensor")


def second_shard_of(parameter: Any) -> torch.Tensor | None:
    """Return the larger part that ZeRO-3 may keep beside it, to gather within a machine."""
    return read(parameter, "ds_secondary_tensor")


@dataclasses.dataclass(frozen=True)
class Stage3:
    """What the engine of ZeRO-3 keeps: parts in the dtype they are trained in, those of gradients, and its settings.

    `prefetched`, `reused` and `living` are in items.
    """

    masters: tuple[torch.Tensor, ...]
    gradients: torch.Tensor
    bucket_items: int
    bucket_dtypes: tuple[torch.dtype, ...]
    is_contiguous: bool
    prefetched: int
    reused: int
    living: int
    scatters: bool


def find_stage_3(parameters: Iterable[torch.Tensor]) -> Stage3 | None:
    """Return what the engine of ZeRO-3 keeps that trains `parameters`, None where there is none yet."""
    found = (getattr(parameter, ENGINE_3, None) for parameter in parameters)
    engine = next((each for each in found if each is not None), None)
    if engine is None:
        return None
    offload = read(engine, "parameter_offload")
    return Stage3(
        masters=tuple(read(engine, "fp32_partitioned_groups_flat")),
        gradients=read(engine, "grad_partitions_flat_buffer"),
        bucket_items=read(engine, "reduce_bucket_size"),
        bucket_dtypes=tuple(read(engine, "ipg_buckets")),
        is_contiguous=read(engine, "contiguous_gradients"),
        prefetched=read(offload, "_prefetch_bucket_sz"),
        reused=read(offload, "_max_reuse_distance_in_numel"),
        living=read(offload, "_max_available_parameters_in_numel"),
        scatters=read(engine, "reduce_scatter"),
    )


@dataclasses.dataclass(frozen=True)
class Partitions:
    """Parameters that lie one behind the other in one tensor, at `offsets`; each rank trains `part_items` of it."""

    parameters: tuple[torch.Tensor, ...]
    offsets: tuple[int, ...]
    part_items: int
    whole: torch.Tensor
    master: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Stages1And2:
    """What the engine of ZeRO-1 or ZeRO-2 keeps, and its settings.

    Gradients are of `dtype`, summed in `sum_dtype`, reduced in `bucket_dtypes`. It `keeps_parts` of gradients alone
    (ZeRO-2), `overlaps` reductions with backward, and `scatters` them.
    """

    groups: tuple[Partitions, ...]
    dtype: torch.dtype
    sum_dtype: torch.dtype
    bucket_items: int
    bucket_dtypes: tuple[torch.dtype, ...]
    is_contiguous: bool
    keeps_parts: bool
    overlaps: bool
    scatters: bool
    micro_batches: int
    offloads: bool
    staged: torch.Tensor | None


def is_under_stages_1_and_2(parameter: torch.Tensor) -> bool:
    """Return whether ZeRO-1 or ZeRO-2 trains parts of `parameter`, or what DeepSpeed has for bfloat16 alone."""
    return hasattr(parameter, MASTERS_LINK)


def is_trained(parameter: torch.Tensor) -> bool:
    """Return whether an engine of ZeRO trains `parameter`."""
    return parameter.requires_grad and (is_partitioned(parameter) or is_under_stages_1_and_2(parameter))


def find_stages_1_and_2(parameters: Iterable[torch.Tensor]) -> Stages1And2 | None:
    """Return what the engine of ZeRO-1 or ZeRO-2 keeps that trains `parameters`, None where none does.

    It is found by its hooks on their gradients.

    Raises:
        MovedError: they are trained so, but no hook leads to an engine.
    """
    linked = [parameter for parameter in parameters if is_under_stages_1_and_2(parameter)]
    if not linked or STAGES_1_AND_2 not in sys.modules:
        return None
    kind = read(sys.modules[STAGES_1_AND_2], "DeepSpeedZeroOptimizer")
    around = (value for each in linked for value in _values_around(torch_tensors.gradient_hooks(each)))
    engine = next((value for value in around if isinstance(value, kind)), None)
    if engine is None:
        raise MovedError(
            "DeepSpeed: no hook on a parameter leads to the engine that trains it, expected one of ZeRO-1 or ZeRO-2\n"
            "leave contiguous_gradients on, and gradients in the dtype of the parameters"
        )
    offloads = read(engine, "cpu_offload")
    return Stages1And2(
        groups=tuple(_partitions_of(engine)),
        dtype=read(engine, "dtype"),
        sum_dtype=read(engine, "gradient_accumulation_dtype"),
        bucket_items=read(engine, "reduce_bucket_size"),
        bucket_dtypes=tuple(read(engine, "ipg_buckets")),
        is_contiguous=read(engine, "contiguous_gradients"),
        keeps_parts=read(engine, "partition_gradients"),
        overlaps=read(engine, "overlap_comm"),
        scatters=read(engine, "reduce_scatter"),
        micro_batches=read(engine, "gradient_accumulation_steps"),
        offloads=offloads,
        staged=read(engine, "temp_grad_buffer_for_gpu_offload") if offloads else None,
    )


def _partitions_of(engine: Any) -> Iterator[Partitions]:
    names = ("round_robin_bit16_groups", "round_robin_bit16_offsets", "partition_size")
    lists = (read(engine, name) for name in (*names, "bit16_groups_flat", "single_partition_of_fp32_groups"))
    for parameters, offsets, items, whole, master in zip(*lists, strict=True):
        yield Partitions(tuple(parameters), tuple(offsets), int(items), whole, master)


def _values_around(hooks: Iterable[Callable[..., Any]]) -> Iterator[Any]:
    """Yield what the closures of functions hold."""
    for hook in hooks:
        for cell in getattr(hook, "__closure__", None) or ():
            yield content_of(cell)


def content_of(cell: Any) -> Any:
    """Return what a variable of a closure holds; None where nothing was put there yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def group_of(module: nn.Module) -> Any:
    """Return the process group whose ranks share the parameters of `module`, or what trains them, or None.

    Where they differ, as an expert's does under expert parallelism, it is the largest. Under hpZ, which gathers within
    a machine, it is the one of all machines: gradients are reduced over it.
    """
    found = (getattr(each, name, None) for each in module.parameters() for name in GROUPS)
    return max((group for group in found if group is not None), key=lambda group: group.size(), default=None)
