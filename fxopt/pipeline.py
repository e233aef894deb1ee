"""The table of contents: what `fxopt.optimize` does to a captured graph, and how it is put into a model.

Read `PASSES` top to bottom, then `optimize`. The runner alone times, verifies and snapshots; passes do their one thing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from fxopt.capture.compiled import are_compiled, name_compiled, note_compiled
from fxopt.capture.installation import (
    Installation,
    Transform,
    check_model,
    check_on_device,
    check_uncompiled,
    find_installation,
)
from fxopt.capture.regions import find_regions
from fxopt.capture.small_inputs import check_example_inputs
from fxopt.capture.warming import start_warming
from fxopt.graph.canonicalize import canonicalize
from fxopt.graph.edit import copy_of
from fxopt.graph.strides import restore_orders
from fxopt.graph.view import find_subgraphs
from fxopt.installing import new_installation
from fxopt.kernels.launcher import compiled_ahead
from fxopt.options import Options, check_options
from fxopt.patterns import ALL
from fxopt.patterns.dropped import keep_bits_of_dropped
from fxopt.planning import check_plan
from fxopt.probing import report_on_small_inputs
from fxopt.remat.budget import check_budget
from fxopt.remat.host import check_host_memory
from fxopt.report.plan import Plan
from fxopt.rewriting.floats import fix_floats
from fxopt.rewriting.pattern import Pattern
from fxopt.rewriting.proof import Prover
from fxopt.rewriting.rewrite import MatchContext, apply_patterns
from fxopt.runner import Job, Pass, run_passes
from fxopt.strictness import check_strictly

log = logging.getLogger("fxopt")


def canonicalize_pass(gm: fx.GraphModule, job: Job) -> None:
    """Rewrite every known spelling to the closed vocabulary, bit for bit the same."""
    canonicalize(gm)


def rewrite_pass(gm: fx.GraphModule, job: Job) -> None:
    """Replace each proven match of a pattern by its semantic op."""
    select = job.options.select and functools.partial(job.options.select, job.region)
    context = MatchContext(job.lazy_outputs, job.prover and job.prover.prove, select)
    patterns = job.options.active_patterns
    fix_floats(gm, patterns, job.lazy_outputs)
    name = "" if job.prover is None else name_compiled(gm, (pattern.name for pattern in patterns))
    if job.prover is not None and name and not are_compiled(name):
        _rehearse_rewrites(gm, job, job.prover)
    job.keep_canonical(gm)
    job.result = apply_patterns(gm, patterns, context)
    if name:
        note_compiled(name)


def _rehearse_rewrites(gm: fx.GraphModule, job: Job, prover: Prover) -> None:
    """Rewrite a copy of `gm` unproven, only to see which kernels the proofs need: these compile meanwhile.

    Where an earlier process has compiled them it would cost more than it saves.
    """
    if len(list(find_subgraphs(gm))) > 1:
        return
    context = MatchContext(lazy_outputs=job.lazy_outputs, prove=prover.rehearse)
    try:
        apply_patterns(copy_of(gm), job.options.active_patterns, context)
    except Exception as error:  # the rewriting that follows will meet it again, and say so
        log.debug("a rehearsal of the rewrites failed: %s: %s", type(error).__name__, error)


def strides_pass(gm: fx.GraphModule, job: Job) -> None:
    """Lay the results out in memory as stock does, where a rewrite made another order of it."""
    restore_orders(gm)


def dropouts_pass(gm: fx.GraphModule, job: Job) -> None:
    """Keep one bit an item of what dropout before an adapter drops, the same items in the same order as stock."""
    keep_bits_of_dropped(gm)


PASSES: tuple[Pass, ...] = (
    ("canonicalize", canonicalize_pass),
    ("rewrite", rewrite_pass),
    ("dropouts", dropouts_pass),
    ("strides", strides_pass),
)


def make_transform(options: Options) -> Transform:
    """Return what runs `PASSES` over a graph as `options` ask for."""
    prover = Prover(compiled_ahead) if options.verify == "on" else None
    return functools.partial(run_passes, passes=PASSES, options=options, prover=prover)


def optimize(
    model: nn.Module,
    *,
    patterns: Iterable[Pattern | str] = ALL,
    disable: Iterable[str] = (),
    lowering: str = "auto",
    verify: str = "on",
    strict: bool = False,
    partial: bool = True,
    cuda_graphs: str = "auto",
    memory_budget: int | float | str | None = "auto",
    plan: Plan | None = None,
    max_host_memory: int | str | None = None,
    example_inputs: dict[str, Any] | None = None,
) -> nn.Module:
    """Make `model` train faster and with less memory, in place, and return the same object.

    Graphs are captured, rewritten, proven and compiled at the first training call of each form.

    Args:
        model: a `torch.nn.Module` on its device, under DistributedDataParallel or `fully_shard` or before it.
        patterns: patterns to use, in order: names of the library's, or `Pattern`s of your own.
        disable: names of patterns not to use.
        lowering: "inductor", "plain" (node by node), or "auto": Inductor on a GPU, plain on a CPU.
        verify: "on" proves every rewrite numerically before it is used; "off" skips the proofs.
        strict: raise where a known form was not rewritten, a proof failed or a region was not captured, as
            seen in one forward pass on small inputs, instead of reporting it.
        partial: where a block cannot be captured in one graph, optimize its pieces, which are not planned; False
            leaves it stock.
        cuda_graphs: "auto" records the kernels of each block once and replays them, on one GPU, where shapes repeat;
            "off" launches them one by one.
        memory_budget: the most that a training step may allocate: bytes, a size like "12GiB", a share of the device
            between 0 and 1, "min", or None for the fastest step. "auto" is "min" where gradient checkpointing was
            switched on; elsewhere what costs one pass over memory is computed again, and a step that would not fit
            what is free begins again under the fastest plan that does. A plan is made at the first step.
        plan: what `fxopt.plan` returned, to be carried out as it is.
        max_host_memory: how much of the host's memory a plan may use for values that leave a GPU until backward reads
            them, in bytes or as a size; by default half of what is free on the host when a plan is made, shared by the
            ranks of a machine, for blocks that run longer than they take to launch; 0 for none.
        example_inputs: keyword arguments of the model's forward for that pass; by default fxopt makes
            `input_ids` and `labels` of 2 x 16 tokens.

    Raises:
        FxoptError: not a module, on the meta device, or compiled already by somebody else.
        UnknownNameError: a name that does not exist.
        ProofError, UnmatchedError: with `strict=True`; the model is left as it was.

    >>> import torch, fxopt
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    >>> fxopt.optimize(model) is model
    True
    >>> _ = fxopt.restore(model)
    """
    options = check_options(
        ALL,
        patterns=patterns,
        disable=disable,
        lowering=lowering,
        verify=verify,
        strict=strict,
        partial=partial,
        cuda_graphs=cuda_graphs,
        memory_budget=check_budget(memory_budget),
        plan=check_plan(plan, memory_budget),
        max_host_memory=check_host_memory(max_host_memory),
    )
    given, model = model, check_on_device(check_model(model))
    check_example_inputs(example_inputs)
    check_uncompiled(model)
    installed = find_installation(model)
    differs = "" if installed is None else _find_difference(installed, model, options)
    if installed is not None and not differs:
        return given
    if options.strict:
        check_strictly(report_on_small_inputs(model, options, make_transform(options), example_inputs))
    while installed is not None:
        log.warning("%s was optimized %s: restored, optimized anew", type(model).__name__, differs)
        installed.remove()
        installed = find_installation(model)
        differs = "" if installed is None else _find_difference(installed, model, options)
    installation = new_installation(model, options, make_transform(options))
    for note in installation.ledger.notes:
        log.warning("%s", note)
    installation.install()
    if options.lowering != "plain":
        start_warming(next((parameter.device for parameter in model.parameters()), torch.device("cpu")))
    return given


def _find_difference(installed: Installation, model: nn.Module, options: Options) -> str:
    """Return how `model` was optimized, if not as it is now and with `options`; "" where that would change nothing."""
    if installed.model is not model:
        return f"as {type(installed.model).__name__}"
    if installed.regions != find_regions(model):
        return "with other blocks than it has now"
    return "" if installed.options == options else "with other options"
