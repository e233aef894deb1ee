"""One row: a tiny model of one case, its training step as stock and optimized, and what fxopt made of it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import transformers

import fxopt
from fxopt.coverage.compare import (
    MOST_ERROR,
    Step,
    judge_by_double,
    loss_of,
    one_line,
    relative,
    run_step,
    worst_error,
)
from fxopt.coverage.inputs import AUTO_CLASSES, Case, make_batch
from fxopt.coverage.record import Row
from fxopt.coverage.shrink import tiny_config
from fxopt.demo.training import count_saved_bytes
from fxopt.errors import FxoptError
from fxopt.report.records import MODEL_REGION

SPREAD, VECTOR_SPREAD = 0.1, 0.02
"""Of random values added to every weight, and to those of one dim: no norm is all ones, no bias zero, and matrices
are as large as their few columns ask, or gradients of queries and keys are as small as what rounding leaves."""
MOST_PARAMETERS = 50_000_000


class NotBuilt(Exception):
    """No tiny model of this case trains as stock."""


def measure(case: Case, on_stage: Callable[[str], None] = lambda stage: None) -> Row:
    """Return the row of `case`; every failure is a row with its reason. `on_stage` hears what comes next."""
    row = Row(str(case), case.model_type, case.task, "failed")
    start = time.process_time()
    try:
        on_stage("building")
        try:
            model, batch = build(case, row)
            stock = copy.deepcopy(model)
            theirs = run_step(stock, batch)
            with note_calls(stock) as called:
                again = run_step(stock, batch, seed=1)
        except FxoptError as error:
            raise NotBuilt(str(error)) from error
        except Exception as error:
            if _is_memory(error):
                raise MemoryError(str(error)) from error
            raise NotBuilt(one_line(error)) from error
        if not theirs.loss.isfinite():
            raise NotBuilt(f"stock's loss is {float(theirs.loss)}")
        if worst_error(again, theirs)[0] > MOST_ERROR:
            row.notes.append("stock draws random numbers in training")
        on_stage("optimizing")
        fill(row, model, batch, stock, theirs, called)
    except NotBuilt as error:
        row.status, row.reason = "not built", str(error)
    except Exception as error:
        status = "out of memory" if _is_memory(error) else "failed"
        row.status, row.reason = status, f"{one_line(error)} at {_where(error)}"
    row.seconds = round(time.process_time() - start, 1)
    return row


def build(case: Case, row: Row) -> tuple[Any, dict[str, Any]]:
    """Return the tiny model of `case` in training mode and its batch."""
    if case.task not in AUTO_CLASSES:
        raise NotBuilt(f"unknown task {case.task!r}, expected one of {', '.join(AUTO_CLASSES)}")
    auto = getattr(transformers, AUTO_CLASSES[case.task])
    config = tiny_config(case.model_type)
    model_class = auto._model_mapping.get(type(config), None)
    make = auto.from_config if model_class is None else model_class._from_config
    with torch.device("meta"):
        try:
            shape = make(config)
        except AttributeError:  # a config of several models, of which this task takes one
            config = config.get_text_config(decoder=True)
            shape = make(config)
    row.model = type(shape).__name__
    row.parameters = sum(parameter.numel() for parameter in shape.parameters())
    if row.parameters > MOST_PARAMETERS:
        raise NotBuilt(
            f"the smallest config found has {row.parameters:,} parameters, expected {MOST_PARAMETERS:,} at most"
        )
    del shape
    torch.manual_seed(0)
    model = make(config).train()
    has_experts = any(parameter.ndim == 3 for parameter in model.parameters())
    if has_experts and hasattr(model, "set_experts_implementation") and not traces_grouped_products():
        with contextlib.suppress(ValueError):  # not the experts it can choose for
            model.set_experts_implementation("batched_mm")
            row.notes.append(
                "experts in batched products: the grouped ones here have no backward to trace in float32"
            )
    randomize(model)
    return model, make_batch(model, model.config, case.task)


@functools.cache
def traces_grouped_products() -> bool:
    """Return whether AOTAutograd can trace what stands for grouped products of experts in float32.

    The backward of transformers' own op for them (before 5.23) reads sizes off the values of a tensor.
    """
    grouped: Any = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    if grouped is None:
        return True
    rows, weights = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, 8, requires_grad=True)
    ends = torch.tensor([2, 4], dtype=torch.int32)
    try:
        compiled = torch.compile(lambda *inputs: grouped(*inputs), backend="aot_eager", fullgraph=True)
        compiled(rows, weights, ends).sum().backward()
    except Exception:
        return False
    return True


def randomize(model: torch.nn.Module) -> None:
    """Add random values to all weights; what was left uninitialized becomes small and finite."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.nan_to_num_(0.0, 0.0, 0.0).clamp_(-20, 20)
                spread = SPREAD if parameter.ndim > 1 else VECTOR_SPREAD
                parameter.add_(torch.randn_like(parameter), alpha=spread)


@contextlib.contextmanager
def note_calls(model: torch.nn.Module) -> Iterator[set[str]]:
    """Collect the paths of the modules that are called inside the `with`."""
    called: set[str] = set()

    def note(path: str) -> Callable[..., None]:
        return lambda module, args: called.add(path)

    handles = [module.register_forward_pre_hook(note(path)) for path, module in model.named_modules()]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def fill(
    row: Row, model: Any, batch: dict[str, Any], stock: Any, theirs: Step, called: Collection[str]
) -> None:
    """Optimize `model`, run it as `theirs` was run, and write what is seen into `row`.

    `called` are the modules that stock called: blocks that it leaves out are no concern of ours.
    """
    fxopt.optimize(model)
    ours = run_step(model, batch)
    row.saved_bytes, row.saved_bytes_stock = saved_bytes(model, batch), saved_bytes(stock, batch)
    report = fxopt.explain(model)
    write_report(row, report, called)
    loss_error = relative(ours.loss, theirs.loss)
    row.loss_error = float(f"{loss_error:.2g}")
    missing = ours.gradients.keys() ^ theirs.gradients.keys()
    error, row.worst_gradient = worst_error(ours, theirs)
    row.gradient_error = float(f"{error:.2g}")
    if missing:
        name = min(missing)
        whose = "stock" if name in theirs.gradients else "the optimized model"
        row.status, row.reason = (
            "wrong",
            f"{len(missing)} weights, {name} first, have a gradient in {whose} only",
        )
    elif max(loss_error, error) > MOST_ERROR:
        verdict, row.stock_error = judge_by_double(stock, batch, ours, theirs, row.worst_gradient)
        if verdict:
            row.status, row.reason = "wrong", verdict


def saved_bytes(model: Any, batch: dict[str, Any]) -> int:
    """Return the bytes that one forward saves for backward, weights and buffers left out."""
    torch.manual_seed(0)
    with count_saved_bytes(model) as saved:
        loss = loss_of(model(**batch))
    del loss
    return saved.total


def write_report(row: Row, report: fxopt.Report, called: Collection[str]) -> None:
    """Write what the report says into `row`: regions, sites, what was left and why, status and reason."""
    row.regions = [dataclasses.asdict(dataclasses.replace(each, guards=())) for each in report.regions]
    for region in row.regions:
        del region["guards"]
    row.captures = sum(region.captures for region in report.regions)
    row.fallbacks = [
        f"{'model' if each.region in ('', MODEL_REGION) else each.region}: {each.reason}"
        for each in report.fallbacks
    ]
    row.notes += [note for note in report.notes if "use_cache" not in note]
    row.forms = sorted({form_of(rewrite.op, rewrite.attributes) for rewrite in report.rewrites})
    for site in report.sites:
        counts = row.sites.setdefault(site.pattern, dict(found=0, rewritten=0, refused=0, unmatched=0))
        counts["found"] += site.count
        counts[site.status] += site.count
        if site.status != "rewritten":
            left = dict(pattern=site.pattern, status=site.status, count=site.count)
            row.left.append({**left, "reason": site.reason, "location": site.location, "module": site.module})
    run = [each for each in report.regions if each.kind == "model" or each.module in called]
    captured = [region for region in run if region.status == "captured"]
    reasons = [f"{region.module or 'model'}: {region.reason}" for region in run if region.reason]
    reasons += [f"{region.module or 'model'}: never captured" for region in run if region.status == "pending"]
    of_blocks = [each for each in report.fallbacks if each.region != MODEL_REGION]
    if len(captured) == len(run) and not row.fallbacks:
        row.status = "captured"
        return
    row.reason = "; ".join(dict.fromkeys((*reasons, *row.fallbacks)))
    blocks = [region for region in run if region.kind == "block"]
    if blocks and all(region in captured for region in blocks) and not of_blocks:
        row.status = "blocks captured"
    else:
        row.status = "partly captured" if captured else "stock"


def form_of(op: str, attributes: dict[str, Any]) -> str:
    """Return what tells a normal form of `op` from others: its attributes, of numbers only whether 0 or 1."""

    def shown(value: Any) -> str:
        is_size = isinstance(value, int | float) and not isinstance(value, bool) and value not in (0, 1)
        return "n" if is_size else str(value)

    return f"{op}({', '.join(f'{name}={shown(value)}' for name, value in sorted(attributes.items()))})"


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    frame = frames[-1]
    return f"{frame.filename.split('site-packages/')[-1]}:{frame.lineno}"
