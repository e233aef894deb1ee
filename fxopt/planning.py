"""What brings the planner together with a model: what lives all the time, on which device, under which lowering."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from fxopt.capture import torch_distributed
from fxopt.capture.ledger import Ledger
from fxopt.capture.modules import tensors_of
from fxopt.capture.regions import find_regions
from fxopt.capture.small_inputs import check_example_inputs
from fxopt.capture.spread import device_of as find_device
from fxopt.capture.spread import find_bucket_bytes
from fxopt.errors import FxoptError
from fxopt.kernels import launch
from fxopt.options import Options
from fxopt.remat.devices import Device, device_of
from fxopt.remat.figures import Facts
from fxopt.remat.host import SHARE, free_host_bytes
from fxopt.remat.measured import ROOFLINES
from fxopt.remat.planner import StepPlanner
from fxopt.remat.survey import Survey
from fxopt.report.plan import Plan
from fxopt.report.units import format_bytes
from fxopt.spreading import find_sharded
from fxopt.timing import find_measured

OPTIMIZER_STATES = 2
"""Tensors of its size that an optimizer keeps per parameter it trains: AdamW's; SGD keeps fewer.

It is taken to be fused, as transformers' Trainer makes it: its step then needs nothing for itself."""
WORKSPACE, WIDE_WORKSPACE = (2 * 4096 + 8 * 16) * 2**10, 32 * 2**20
"""What torch gives cuBLAS for each thread, and on Hopper (`getChosenWorkspaceSize`)."""
HOPPER = (9, 0)
MARGIN = 0.03
"""The share of what is free that "auto" leaves alone: for what is not simulated, and for fragments."""


def check_plan(plan: object, budget: object) -> Plan | None:
    """Return `plan` if it is one, and nothing else was asked for.

    Raises:
        FxoptError: no plan, or a budget beside it.
    """
    if plan is None:
        return None
    if not isinstance(plan, Plan):
        raise FxoptError(
            f"plan: expected what fxopt.plan returns, got {type(plan).__name__}\nPlan.from_json(text) reads one"
        )
    if budget != "auto":
        raise FxoptError(
            f"memory_budget: expected none beside a plan, which has its own ({plan.budget}), got {budget!r}\n"
            "leave memory_budget out, or make another plan with fxopt.plan(model, memory_budget)"
        )
    return plan


def make_planner(model: nn.Module, options: Options) -> StepPlanner | None:
    """Return the planner of `model`, or None where it has no blocks that could be planned.

    Raises:
        FxoptError: it has none, and a budget or a plan was given.
    """
    paths = tuple(path for path, _ in find_regions(model).blocks)
    if not paths:
        if options.plan is not None or options.memory_budget not in ("auto", None):
            raise no_blocks(model)
        return None
    find_model = weakref.ref(model)

    def find_facts() -> Facts:
        living = find_model()
        assert living is not None, "the model is gone, expected it to make this call"
        return facts_of(living, paths, options)

    return StepPlanner(options.memory_budget, find_facts, options.plan)


def make_survey(model: nn.Module, options: Options, device: Device | None) -> Survey:
    """Return what plans `model` without training it, for `device` or for its own.

    Raises:
        FxoptError: the model has no repeated blocks.
    """
    paths = tuple(path for path, _ in find_regions(model).blocks)
    if not paths:
        raise no_blocks(model)
    facts = facts_of(model, paths, options, device)
    return Survey(options.memory_budget, lambda: facts)


def no_blocks(model: nn.Module) -> FxoptError:
    """Return the error for a plan of a model that has nothing to plan."""
    return FxoptError(
        f"model: {type(model).__name__} has no repeated blocks, expected a list of modules with parameters\n"
        "fxopt.optimize works without a plan and a memory_budget"
    )


def finish_plan(survey: Survey, ledger: Ledger) -> Plan:
    """Return the plan of what `survey` saw.

    Raises:
        FxoptError: a block was not captured, or the budget is below the smallest possible peak.
    """
    plan = survey.make_plan()
    if plan is None:
        reasons = [*ledger.refused.values(), *(reason for _, reason in ledger.fallbacks)]
        raise FxoptError(
            f"model: not all blocks were captured, expected a graph of each: {next(iter(reasons), 'none was called')}\n"
            "fxopt.explain(model) says which and why"
        )
    return plan


def check_inputs(model: nn.Module, example_inputs: dict[str, Any] | None) -> None:
    """Check that `example_inputs` are a dict whose tensors lie where the model does, or None.

    Raises:
        FxoptError: something else, or on another device.
    """
    check_example_inputs(example_inputs)
    place = next((parameter.device for parameter in model.parameters()), None)
    if example_inputs is None or place is None:
        return
    for name, value in example_inputs.items():
        if isinstance(value, torch.Tensor) and value.device.type != place.type:
            raise FxoptError(
                f"example_inputs: {name} is on {value.device}, expected the model's device {place}\n"
                f"move it: example_inputs[{name!r}].to({str(place)!r})"
            )


def facts_of(
    model: nn.Module, paths: tuple[str, ...], options: Options, named: Device | None = None
) -> Facts:
    """Return what a plan of `model` rests on, as it is now; on the device `named` where that is another one."""
    lowering, sharded = options.lowering, find_sharded(model, paths)
    own = [parameter for parameter in model.parameters() if id(parameter) not in sharded.tensors]
    place = find_device(model)
    device = named or device_of(place)
    find_model = weakref.ref(model)

    def owned() -> list[torch.Tensor]:
        living = find_model()
        return [] if living is None else tensors_of(living)

    trained = sum(_num_bytes(parameter) for parameter in own if parameter.requires_grad)
    held = held_bytes(model, but=sharded.tensors) + sharded.held_bytes
    static = held + OPTIMIZER_STATES * (trained + sharded.trained_bytes) + find_bucket_bytes(own)
    static += workspace_bytes(place, named)
    free: int | None = None
    if place.type == "cuda":
        # Gradients that are there already, of an earlier micro-batch say, are counted beside what is static.
        gradients = sum(_num_bytes(parameter.grad) for parameter in own if parameter.grad is not None)
        allocated = torch.cuda.memory_allocated(place) - gradients
        static = max(static, allocated - sharded.spread.whole_bytes)
        unused = torch.cuda.memory_reserved(place) - allocated
        free = int((allocated + unused + torch.cuda.mem_get_info(place)[0]) * (1 - MARGIN))
    if named is not None:
        free = int(named.memory_bytes * (1 - MARGIN))
        lowering = "inductor" if lowering == "auto" else lowering
    if lowering == "auto":
        lowering = "inductor" if place.type == "cuda" and launch.is_available() else "plain"
    return Facts(
        model=type(model).__name__,
        paths=paths,
        device=device,
        lowering=lowering,
        static_bytes=static,
        gradient_bytes=trained + sharded.update_bytes,
        trained_bytes=trained + sharded.trained_bytes,
        free_bytes=free,
        tied_bytes=find_tied_bytes(model, paths, own),
        declared=launch.DECLARED,
        host_bytes=_host_bytes(options, place),
        host_is_asked=options.max_host_memory is not None or options.plan is not None,
        spread=sharded.spread,
        uncounted=sharded.uncounted,
        measured=ROOFLINES
        if named is not None
        else find_measured(place, _spare_of(options, static, device), owned),
        replayed=_is_replayed(options, lowering, place, named),
        is_assumed=named is not None,
    )


def _is_replayed(options: Options, lowering: str, place: torch.device, named: Device | None) -> bool:
    on_gpu = place.type == "cuda" or named is not None
    is_alone = torch_distributed.num_ranks() == 1
    return on_gpu and is_alone and lowering == "inductor" and options.cuda_graphs == "auto"


def _spare_of(options: Options, static: int, device: Device) -> int | None:
    """Return what the budget leaves beside `static` bytes, None where there is none; the lowest peak leaves nothing."""
    budget = options.memory_budget
    if budget is None or budget == "auto":
        return None
    if isinstance(budget, str):
        return 0
    limit = budget if isinstance(budget, int) else int(budget * device.memory_bytes)
    return max(0, limit - static)


def workspace_bytes(place: torch.device, named: Device | None = None) -> int:
    """Return what torch allocates for cuBLAS on a GPU: one workspace for each thread that multiplies there, two in all.

    Forward runs in one thread, backward in another.
    """
    if named is None and place.type != "cuda":
        return 0
    is_hopper = named.is_hopper if named is not None else torch.cuda.get_device_capability(place) == HOPPER
    return 2 * (WIDE_WORKSPACE if is_hopper else WORKSPACE)


def find_tied_bytes(model: nn.Module, paths: Collection[str], parameters: Collection[nn.Parameter]) -> int:
    """Return the bytes of the largest of `parameters` that trains, and that two modules outside the blocks hold.

    A table that is the head's weight as well has its gradient from the head when that of the table comes, as large as
    it: both are there until they are added.
    """
    prefixes = tuple(f"{path}." for path in paths)
    outside = [
        parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and not name.startswith(prefixes)
    ]
    times = collections.Counter(map(id, outside))
    own = {id(parameter) for parameter in parameters}
    tied = [
        _num_bytes(parameter) for parameter in outside if times[id(parameter)] > 1 and id(parameter) in own
    ]
    return max(tied, default=0)


def _host_bytes(options: Options, place: torch.device) -> int:
    """Return how much plans may leave on the host: what was asked for, else this rank's part of half of what is free.

    Where the model lies on no GPU nothing leaves unasked, but for a given plan.

    Raises:
        FxoptError: a plan was given that needs more.
    """
    most = options.max_host_memory
    if most is None:
        wanted = place.type == "cuda" or (options.plan is not None and options.plan.host_bytes > 0)
        most = int(free_host_bytes() * SHARE / torch_distributed.num_local_ranks()) if wanted else 0
    if options.plan is not None and options.plan.host_bytes > most:
        raise FxoptError(
            f"plan: keeps {format_bytes(options.plan.host_bytes)} on the host, expected at most {format_bytes(most)}\n"
            "make one with fxopt.plan(model, memory_budget, max_host_memory=...), or give max_host_memory"
        )
    return most


def held_bytes(model: nn.Module, but: Collection[int] = ()) -> int:
    """Return the bytes of the weights and buffers of `model` and of what hangs on them, but for those of ids `but`."""
    holders = (*model.parameters(), *(model.modules() if but else ()))
    scales = {id(tensor): tensor for holder in holders for tensor in _attached_to(holder)}
    own = (tensor for tensor in (*tensors_of(model), *scales.values()) if id(tensor) not in but)
    return sum(map(_num_bytes, own))


def _attached_to(holder: object, depth: int = 3) -> Iterator[torch.Tensor]:
    """Yield the tensors that hang on a parameter without being the model's own: the scales of packed weights."""
    attributes: dict[str, Any] = getattr(holder, "__dict__", {}) if depth else {}
    for name, item in attributes.items():
        if name.startswith("_") or isinstance(item, nn.Module | type) or callable(item):
            continue
        if isinstance(item, torch.Tensor):
            yield item
        else:
            yield from _attached_to(item, depth - 1)


def _num_bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()
