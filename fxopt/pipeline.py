"""The table of contents: what `fxopt.optimize` does to a captured graph, and how it is put into a model.

Read `PASSES` top to bottom. The runner alone times, verifies and snapshots; passes do their one thing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch import fx, nn

from fxopt.capture.gradients import keep_stock_gradients
from fxopt.capture.installation import (
    Installation,
    check_model,
    check_on_device,
    check_uncompiled,
    find_installation,
    slots_emptied,
)
from fxopt.capture.ledger import Ledger
from fxopt.capture.lowering import choose_lowering, is_on_gpu, name_of, run_uncompiled
from fxopt.capture.model_call import REGION
from fxopt.capture.regions import find_regions
from fxopt.capture.segments import compile_model_graph, find_segments
from fxopt.capture.small_inputs import check_example_inputs, run_on_small_inputs
from fxopt.capture.torch_compat import plain_backend, trace_joint
from fxopt.capture.warming import start_warming
from fxopt.errors import FxoptError, ProofError, UnmatchedError
from fxopt.graph.anchors import find_anchors
from fxopt.graph.canonicalize import canonicalize
from fxopt.graph.edit import copy_of
from fxopt.graph.node_records import node_records
from fxopt.graph.python import to_python
from fxopt.graph.snapshot import snapshot
from fxopt.graph.strides import note_orders, restore_orders
from fxopt.graph.verify import note_items, note_placeholders, verify
from fxopt.graph.view import find_subgraphs
from fxopt.graph.work import ambient_autocast, copy_for_work, measure_work
from fxopt.kernels.launcher import compiled_ahead
from fxopt.options import Options, check_options
from fxopt.patterns import ALL
from fxopt.patterns.dropped import keep_bits_of_dropped
from fxopt.planning import check_inputs, check_plan, finish_plan, make_planner, make_survey
from fxopt.remat.budget import check_budget
from fxopt.remat.devices import Device
from fxopt.remat.host import check_host_memory
from fxopt.remat.survey import Survey
from fxopt.report.figures import render_code
from fxopt.report.plan import Plan
from fxopt.report.records import GraphRecord, PassRecord, Report
from fxopt.rewriting.pattern import Pattern
from fxopt.rewriting.proof import Prover
from fxopt.rewriting.rewrite import MatchContext, RewriteResult, apply_patterns
from fxopt.sites import Outcome, build_report, find_sites

log = logging.getLogger("fxopt")


@dataclasses.dataclass
class Job:
    """One graph on its way through the passes: what they may read, and where they leave their records."""

    options: Options
    region: str
    lazy_outputs: bool
    prover: Prover | None
    result: RewriteResult = dataclasses.field(default_factory=RewriteResult)


def canonicalize_pass(gm: fx.GraphModule, job: Job) -> None:
    """Rewrite every known spelling to the closed vocabulary, bit for bit the same."""
    canonicalize(gm)


def rewrite_pass(gm: fx.GraphModule, job: Job) -> None:
    """Replace each proven match of a pattern by its semantic op."""
    select = job.options.select and functools.partial(job.options.select, job.region)
    context = MatchContext(job.lazy_outputs, job.prover and job.prover.prove, select)
    if job.prover is not None and is_on_gpu(gm):
        _rehearse_rewrites(gm, job, job.prover)
    job.result = apply_patterns(gm, job.options.active_patterns, context)


def _rehearse_rewrites(gm: fx.GraphModule, job: Job, prover: Prover) -> None:
    """Rewrite a copy of `gm` unproven, only to see which kernels the proofs need: these compile meanwhile."""
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


PASSES: tuple[tuple[str, Callable[[fx.GraphModule, Job], None]], ...] = (
    ("canonicalize", canonicalize_pass),
    ("rewrite", rewrite_pass),
    ("dropouts", dropouts_pass),
    ("strides", strides_pass),
)


def run_passes(
    gm: fx.GraphModule, *, region: str, lazy_outputs: bool, options: Options, prover: Prover | None
) -> Outcome:
    """Run `PASSES` over `gm` in place and return what was found and done.

    Raises:
        VerifyError: a pass left the graph invalid.
    """
    note_placeholders(gm)
    note_items(gm)
    note_orders(gm)
    anchors = find_anchors(gm)
    before, nodes_before, stock = snapshot(gm), node_records(gm), copy_for_work(gm)
    job = Job(options, region, lazy_outputs, prover)
    records: list[PassRecord] = []
    for name, run in PASSES:
        start, num_before = time.perf_counter(), len(gm.graph.nodes)
        run(gm, job)
        elapsed_ms = (time.perf_counter() - start) * 1e3
        verify(gm, name)
        records.append(PassRecord(name, round(elapsed_ms, 2), num_before, len(gm.graph.nodes)))
    gm.recompile()
    sites, mismatches, backends = find_sites(
        gm, anchors, job.result, options.active_patterns, lazy_outputs, options.disable
    )
    rewrites = tuple(rewrite.record for rewrite in job.result.rewrites)
    graph = GraphRecord(
        region,
        0,
        before,
        snapshot(gm),
        rewrites,
        tuple(records),
        nodes_before=nodes_before,
        nodes_after=node_records(gm),
        code=to_python(gm, "tail" if region == REGION else "block"),
    )
    rewritten, autocast = copy_for_work(gm), ambient_autocast()
    measure = functools.cache(lambda: (measure_work(stock, autocast), measure_work(rewritten, autocast)))
    return Outcome(sites, mismatches, graph, backends, measure)


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
            between 0 and 1, "min", or None for the fastest step. "auto" plans only where gradient checkpointing was
            switched on, as "min"; elsewhere what costs one pass over memory is computed again. A plan is made at the
            first step.
        plan: what `fxopt.plan` returned, to be carried out as it is.
        max_host_memory: how much of the host's memory a plan may use for values that leave a GPU until backward reads
            them, in bytes or as a size; by default none, but what a given `plan` needs.
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
        _check_strictly(report_on_small_inputs(model, options, example_inputs))
    while installed is not None:
        log.warning("%s was optimized %s: restored, optimized anew", type(model).__name__, differs)
        installed.remove()
        installed = find_installation(model)
        differs = "" if installed is None else _find_difference(installed, model, options)
    installation = new_installation(model, options)
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


def plan(
    model: nn.Module,
    memory_budget: int | float | str | None = "auto",
    example_inputs: dict[str, Any] | None = None,
    *,
    patterns: Iterable[Pattern | str] = ALL,
    disable: Iterable[str] = (),
    lowering: str = "auto",
    max_host_memory: int | str | None = None,
) -> Plan:
    """Return what each block of `model` should save for backward and compute again; nothing is changed or trained.

    One forward pass runs on `example_inputs`, keyword arguments of the model's forward, without saving anything:
    give them the batch and length of your training step. Works on the meta device. `print` shows the plan,
    `to_json` writes it, `fxopt.optimize(model, plan=...)` carries it out.

    Args:
        model: a `torch.nn.Module`.
        memory_budget: as `fxopt.optimize` takes it, but that "auto" is the fastest that fits what is free on a GPU.
        example_inputs: by default `input_ids` and `labels` of 2 x 16 tokens.
        patterns, disable, lowering, max_host_memory: as `fxopt.optimize` takes them: a plan holds for the graphs that
            they make.

    Raises:
        FxoptError: not a module, no inputs could be made, inputs on another device, a malformed budget or one below
            the smallest possible peak, or blocks that could not be captured.

    >>> import torch, fxopt
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    >>> fxopt.plan(model, None, {"input": torch.randn(2, 4)}).residual_bytes
    64
    """
    options = options_for_plan(
        memory_budget, lowering, patterns=patterns, disable=disable, max_host_memory=max_host_memory
    )
    return finish_plan(*survey_model(check_model(model), options, example_inputs))


def survey_model(
    model: nn.Module, options: Options, example_inputs: dict[str, Any] | None, device: Device | None = None
) -> tuple[Survey, Ledger]:
    """Return what was seen of the joint graphs of `model`, for `device` or its own, and what happened meanwhile."""
    with surveyed(model, options, example_inputs, device) as (survey, probe):
        return survey, probe.ledger


@contextlib.contextmanager
def surveyed(
    model: nn.Module, options: Options, example_inputs: dict[str, Any] | None, device: Device | None
) -> Generator[tuple[Survey, Installation]]:
    """Run the body while `model` still has what saw its joint graphs in one forward pass."""
    check_inputs(model, example_inputs)
    survey = make_survey(model, options, device)
    trace = functools.partial(trace_joint, decomposed=survey.lowering == "inductor")
    with slots_emptied(model):
        probe = Installation(model, options, _make_transform(options), trace, partial=False, planner=survey)
        probe.install()
        try:
            run_on_small_inputs(model, example_inputs)
            yield survey, probe
        finally:
            probe.remove()


def options_for_plan(
    memory_budget: object,
    lowering: str = "auto",
    *,
    patterns: Iterable[Pattern | str] = ALL,
    disable: Iterable[str] = (),
    max_host_memory: int | str | None = None,
) -> Options:
    """Return the options of a plan; its rewrites are not proven, as nothing is trained."""
    return check_options(
        ALL,
        patterns=patterns,
        disable=disable,
        lowering=lowering,
        verify="off",
        strict=False,
        partial=False,
        memory_budget=check_budget(memory_budget),
        max_host_memory=check_host_memory(max_host_memory),
    )


def restore(model: nn.Module) -> nn.Module:
    """Give back the stock behaviour of an optimized model, bit for bit, and return the same object.

    What others compiled since (`block.compile()`) stays. Where `model` holds an optimized model, or was a part of
    one (adapters put around it, or merged), that one is restored.

    Raises:
        FxoptError: nothing in `model` is optimized.

    >>> import torch, fxopt
    >>> model = fxopt.optimize(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)))
    >>> fxopt.restore(model) is model
    True
    """
    installation = find_installation(check_model(model))
    if installation is None:
        raise FxoptError(
            f"model: {type(model).__name__} is not optimized, expected a model that fxopt.optimize was given\n"
            "a copy or a reloaded model is a stock model already"
        )
    while installation is not None:
        for path in installation.find_replaced():
            log.warning("%s: compiled by module.compile() since fxopt.optimize, left so", path or "the model")
        installation.remove()
        installation = find_installation(model)
    return model


def explain(model: nn.Module, example_inputs: dict[str, Any] | None = None) -> Report:
    """Return the report of what fxopt did, or would do, to `model`; nothing is changed.

    On a model that has run optimized, this is what was done. Otherwise fxopt runs one forward pass in
    training mode on small inputs of its own (`input_ids` and `labels` of 2 x 16 tokens) or on
    `example_inputs`, keyword arguments of the model's forward. Works on the meta device.

    Raises:
        FxoptError: not a module, or no inputs could be made for it.

    >>> import torch, fxopt
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    >>> report = fxopt.explain(model, {"input": torch.randn(2, 4)})
    >>> report.sites
    ()
    """
    model = check_model(model)
    installation = find_installation(model)
    if installation is not None and installation.ledger.has_run and example_inputs is None:
        return build_report(installation)
    check_uncompiled(model)
    options = installation.options if installation is not None else _default_options()
    return report_on_small_inputs(model, options, example_inputs)


def trace(model: nn.Module, example_inputs: dict[str, Any] | None = None) -> str:
    """Return the canonical graphs of `model`'s regions, which patterns match, as Python that runs.

    One function per distinct block, and `tail` for what stands after the blocks, with shapes and lines of the model's
    source. Inputs are made as by `explain`.

    Raises:
        FxoptError: not a module, or no inputs could be made for it.

    >>> import torch, fxopt
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    >>> print(fxopt.trace(model, {"input": torch.randn(2, 4)}))
    import torch
    import torch.nn.functional as F
    ...
        input_1 = F.linear(l_kwargs_input, v_0_weight, v_0_bias)  # f32[2, 4]
        # 1
        input_2 = F.relu(input_1)  # f32[2, 4]
        return (input_2,)
    <BLANKLINE>
    """
    model = check_model(model)
    check_uncompiled(model)
    report = report_on_small_inputs(model, Options(patterns=()), example_inputs)
    return render_code(report)


def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Compile one graph for `torch.compile(model, backend="fxopt")`: the same passes, torch's own entry.

    Torch does not tell a backend whether the model trains, so logits stay lazy wherever gradients are on.
    """
    options = _default_options()
    training = torch.is_grad_enabled()
    transform = _make_transform(options)
    outcome = transform(gm, region="model", lazy_outputs=training)
    log.info("%d sites in this graph: %s", len(outcome.sites), [site.pattern for site in outcome.sites])
    lowering, reason = choose_lowering(options.lowering, gm)
    if reason:
        log.warning("%s", reason)
    lower = keep_stock_gradients(lowering, "model")
    return compile_model_graph(gm, example_inputs, lower, find_segments(gm))


def _default_options() -> Options:
    return Options(patterns=tuple(ALL))


def _make_transform(options: Options) -> Callable[..., Outcome]:
    prover = Prover(compiled_ahead) if options.verify == "on" else None
    return functools.partial(run_passes, options=options, prover=prover)


def new_installation(
    model: nn.Module, options: Options, lower: Callable[..., Any] | None = None
) -> Installation:
    """Return what `install()` puts into `model`; graphs are compiled by `lower`, else as the options say."""

    def lower_graph(
        gm: fx.GraphModule, example_inputs: list[Any], mark: Any = None, *, graphed: bool = False
    ) -> Callable[..., Any]:
        lowering, reason = choose_lowering(options.lowering, gm)
        if reason:
            installation.ledger.note(reason)
        replayed = ", replayed as CUDA graphs" if graphed and lowering is not plain_backend else ""
        installation.ledger.lowerings.setdefault(name_of(lowering) + replayed)
        return lowering(gm, example_inputs, mark, graphed=graphed)

    installation = Installation(
        model,
        options,
        _make_transform(options),
        lower or lower_graph,
        partial=options.partial,
        planner=None if lower else make_planner(model, options),
        replayed=lower is None and options.cuda_graphs == "auto",
    )
    return installation


def report_on_small_inputs(
    model: nn.Module, options: Options, example_inputs: dict[str, Any] | None
) -> Report:
    """Return the report of one forward pass of `model` with `options`; the model stays as it is."""
    with slots_emptied(model):
        probe = new_installation(model, options, run_uncompiled)
        probe.install()
        try:
            run_on_small_inputs(model, example_inputs)
            return build_report(probe)
        finally:
            probe.remove()


def _check_strictly(report: Report) -> None:
    for region in report.regions:
        if region.reason:
            raise UnmatchedError(
                f"{region.module}: expected a captured {region.kind}, it stays stock: {region.reason}\n"
                "strict=False reports it and goes on"
            )
    for site in report.sites:
        where = f"at {site.module} ({site.location})"
        if site.status == "refused" and site.proof is not None and not site.proof.passed:
            raise ProofError(
                f"{site.pattern}: the proof failed, {site.reason}\n{where}\n"
                f"disable=({site.pattern!r},) leaves these sites stock"
            )
        if site.status != "rewritten":
            raise UnmatchedError(
                f"{site.pattern}: expected every known form rewritten, this one was {site.status}: {site.reason}\n"
                f"{where}\nstrict=False reports it and goes on"
            )
