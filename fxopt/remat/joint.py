"""A joint graph as the planner reads it: forward values, which of them backward reads, and who holds which storage."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from fxopt.graph.backward import find_backward
from fxopt.graph.quantized import arguments_of
from fxopt.graph.sizes import number_of
from fxopt.graph.storage import key_of
from fxopt.graph.torch_private import schema_of
from fxopt.remat.cost import (
    Declarations,
    cost_of,
    is_fusible,
    op_of,
    tensors_in,
    workspace_of,
)
from fxopt.remat.dag import Dag, Value
from fxopt.remat.devices import Device

ROUNDING = 512
"""Torch's CUDA allocator gives out whole blocks of this many bytes."""
INPUT = "input"
CHUNK = "chunk"
"""Where the meta of a node that runs on some rows names the node that it was copied from."""
WRITTEN = "reads_written"
"""Where a node's meta says that it reads what the graph's caller writes to after forward: never computed again."""
PART = "part_of"
"""Where the meta of a node that takes some rows of a value for backward has the name of that value's, and its own."""
REPLAYS = "replays"
"""Where a node's meta names the forward node whose value it computes again, "" where that one is never saved."""
COPIED_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "partitioner_tag", "seq_nr", "from_node")
"""What the meta of a node that a plan adds has of the one that it is made for."""
Cost = Callable[..., int]
"""Takes a node, and what its kernel reads where these are not its operands; gives picoseconds."""


@dataclasses.dataclass(frozen=True)
class Overwriting:
    """How a node may run in place: the storages that it writes to, those of the results left there, its workspace."""

    taken: tuple[int, ...]
    left: frozenset[int]
    workspace: int


@dataclasses.dataclass(frozen=True)
class Joint:
    """One joint graph: `forward` are its forward nodes in the order of `dag.values`, `backward` the others.

    `storages` gives each node the storages of its value, `sizes` the bytes of these. `chained` are the storages of
    what the block before made; `shared` those of other inputs, which all blocks read; `held` both these and the
    model's own, which live anyway. `passed_on` are those of the gradient of that input, which lives until the block
    before is done. `forward_cost` is the part of `compute_cost` that forward takes, `measured_cost` the part that was
    timed, of the nodes `measured`. `overwriting` are the ways in which nodes may run in place, the most frugal first.
    """

    forward: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]
    dag: Dag
    storages: dict[fx.Node, tuple[int, ...]]
    sizes: dict[int, int]
    chained: frozenset[int]
    shared: frozenset[int]
    held: frozenset[int]
    passed_on: frozenset[int]
    results: tuple[fx.Node, ...]
    gradients: tuple[fx.Node, ...]
    fused: frozenset[fx.Node]
    workspaces: dict[fx.Node, int]
    overwriting: dict[fx.Node, tuple[Overwriting, ...]]
    compute_cost: int
    forward_cost: int
    measured_cost: int
    measured: frozenset[fx.Node]
    weights: tuple[Any, ...]
    device: Device

    @property
    def key(self) -> tuple[Any, ...]:
        """What two graphs share that have one menu: their ops, what backward reads, and the forms of the weights."""
        return tuple(value.label for value in self.dag.values), self.dag.needed, self.weights


def read_joint(
    graph: fx.Graph,
    held: Collection[int],
    device: Device,
    *,
    fuses: bool,
    last: bool = False,
    declared: Declarations | None = None,
    measured: Mapping[fx.Node, int] | None = None,
) -> Joint:
    """Return `graph` as the planner reads it.

    `held` are the numbers of the graph's inputs that are the model's own tensors; `fuses` whether pointwise
    ops are computed within the kernels that read them. A block hands on a value of the form it was given; with `last`,
    of a piece after the blocks, every input is its own. `declared` is what ops say of themselves,
    `measured` the picoseconds of nodes that were timed; the others cost their roofline.
    """
    nodes = [node for node in graph.nodes if node.op != "output"]
    backward = find_backward(nodes)
    forward = [node for node in nodes if node not in backward]
    outputs: list[Any] = list(graph.output_node().args[0])  # pyright: ignore
    results = tuple(node for node in outputs if isinstance(node, fx.Node) and node not in backward)
    gradients = tuple(node for node in outputs if isinstance(node, fx.Node) and node in backward)
    storages = {node: _storages_of(node) for node in nodes}
    sizes = {storage: size for node in nodes for storage, size in _sizes_of(node).items()}
    inputs = [node for node in forward if node.op == "placeholder"]
    own = [node for number, node in enumerate(inputs) if number not in held]
    declared, timed = declared or {}, dict(measured or {})

    def cost(node: fx.Node, reads: Iterable[fx.Node] | None = None) -> int:
        return timed[node] if node in timed else cost_of(node, device, declared, reads)

    forms = {_form(node) for node in results}
    chained = frozenset(s for node in own if last or _form(node) in forms for s in storages[node])
    inner = {_form(node) for node in own if last or _form(node) in forms}
    rest = frozenset(s for node in inputs for s in storages[node]) - chained
    shared = frozenset(s for node in own for s in storages[node]) - chained
    fused = frozenset(node for node in nodes if fuses and is_fusible(node))
    places = {node: place for place, node in enumerate(forward)}
    by_name = {node.name: place for node, place in places.items()}
    names = _labels_of(forward)
    values = tuple(
        Value(
            names[node],
            tuple(places[source] for source in node.all_input_nodes),
            _saved_bytes(node, storages, sizes, rest),
            _recompute_cost(node, storages, cost, fused),
            by_name.get(node.meta.get(REPLAYS, "")),
        )
        for node in forward
    )
    needed = frozenset(
        places[source]
        for node in (*backward, *gradients)
        for source in node.all_input_nodes
        if source in places and storages[source]
    )
    runs = {node: _run_cost(node, storages, cost, fused) for node in nodes if REPLAYS not in node.meta}
    return Joint(
        tuple(forward),
        tuple(node for node in nodes if node in backward),
        Dag(values, needed),
        storages,
        sizes,
        chained,
        shared,
        rest,
        frozenset(s for node in gradients if _form(node) in inner for s in storages[node]),
        results,
        gradients,
        fused,
        {node: workspace_of(node, declared) for node in nodes if node.target in declared},
        {
            node: _overwritings(node, storages, declared)
            for node in nodes
            if fuses and node.target in declared
        },
        sum(runs.values()),
        sum(runs.get(node, 0) for node in forward),
        sum(runs.get(node, 0) for node in timed),
        frozenset(timed),
        tuple(_form(node) for number, node in enumerate(inputs) if number in held),
        device,
    )


def _overwritings(
    node: fx.Node, storages: dict[fx.Node, tuple[int, ...]], declared: Declarations
) -> tuple[Overwriting, ...]:
    """Return the ways in which `node` may run in place, where nobody reads later what it writes to."""
    found: list[Overwriting] = []
    for form in declared[node.target].in_place:
        given = arguments_of(node)
        written = [a.name for a in schema_of(form.op).arguments if a.alias_info and a.alias_info.is_write]
        places = [given[name] for name in written if isinstance(given[name], fx.Node)]
        sources: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), sources.append)
        read = [storage for source in sources for storage in storages[source]]
        values: list[Any] = list(node.meta["val"])
        left = [values[number] for number in form.results if isinstance(values[number], torch.Tensor)]
        returned = [value for number, value in enumerate(values) if number not in form.results]
        is_complete = len(returned) == len(schema_of(form.op).returns) and all(
            isinstance(value, torch.Tensor) for value in returned
        )
        fits = is_complete and all(
            _is_alike(values[number], given[name]) for number, name in form.results.items()
        )
        taken = tuple(storage for place in places for storage in storages[place])
        if places and fits and all(read.count(storage) == 1 for storage in taken):
            workspace = workspace_of(node, declared, form.op)
            found.append(Overwriting(taken, frozenset(map(key_of, left)), workspace))
    return tuple(found)


def _is_alike(value: Any, argument: Any) -> bool:
    """Return whether a result may be left in an argument: both are tensors of one form, or neither is there."""
    if not isinstance(value, torch.Tensor) or not isinstance(argument, fx.Node):
        return value is None and argument is None
    place = argument.meta["val"]
    return _form(argument) == (tuple(map(number_of, value.shape)), value.dtype) and place.is_contiguous()


def _labels_of(forward: list[fx.Node]) -> dict[fx.Node, str]:
    """Return names that another capture of the same block gives the same values."""
    counts: Counter[str] = Counter()
    labels: dict[fx.Node, str] = {}
    by_name = {node.name: node for node in forward}
    for node in forward:
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            labels[node] = f"{labels[node.args[0]]}.{node.args[1]}"
            continue
        source, part = node.meta.get(PART) or (node.meta.get(REPLAYS, ""), "again")
        if source in by_name:
            labels[node] = f"{labels[by_name[source]]}/{part}"
            continue
        name = INPUT if node.op == "placeholder" else _name_of(node)
        if CHUNK in node.meta:  # so that names elsewhere are those of the graph without chunks
            name = f"{name}/chunk"
        if name == INPUT and not tensors_in(node.meta.get("val")):
            name = "size"
        labels[node] = f"{name}#{counts[name]}"
        counts[name] += 1
    return labels


def _name_of(node: fx.Node) -> str:
    """Return the name of what `node` calls, as `namespace.op`."""
    op = op_of(node)
    if op is not None:
        return op.name().partition(".")[0].replace("::", ".")
    return getattr(node.target, "__name__", str(node.target))


def _storages_of(node: fx.Node) -> tuple[int, ...]:
    return tuple(map(key_of, tensors_in(node.meta.get("val"))))


def _sizes_of(node: fx.Node) -> dict[int, int]:
    return {
        key_of(value): number_of(value.untyped_storage().nbytes())
        for value in tensors_in(node.meta.get("val"))
    }


def _form(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(map(number_of, value.shape)), value.dtype


def is_view(node: fx.Node, storages: dict[fx.Node, tuple[int, ...]]) -> bool:
    """Return whether the value of `node` lies in the storage of what it is computed from."""
    if node.op != "call_function" or not storages[node]:
        return False
    of = node.args[0] if node.target is operator.getitem else node
    before = {storage for source in of.all_input_nodes for storage in storages[source]}  # pyright: ignore
    return before.issuperset(storages[node])


def _saved_bytes(
    node: fx.Node, storages: dict[fx.Node, tuple[int, ...]], sizes: dict[int, int], held: Collection[int]
) -> int | None:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None if node.op == "call_function" else 0
    if is_view(node, storages):
        return None
    return sum(0 if storage in held else rounded(sizes[storage]) for storage in storages[node])


def _recompute_cost(
    node: fx.Node,
    storages: dict[fx.Node, tuple[int, ...]],
    cost: Cost,
    fused: Collection[fx.Node],
) -> int | None:
    if node.op != "call_function":
        return None
    if node.target is operator.getitem or is_view(node, storages) or not storages[node]:
        return 0
    if is_random(node) or WRITTEN in node.meta:
        return None
    return 0 if node in fused else cost(node)


def _run_cost(
    node: fx.Node,
    storages: dict[fx.Node, tuple[int, ...]],
    cost: Cost,
    fused: Collection[fx.Node],
) -> int:
    """Return what `node` takes once; a fused one nothing, where all that reads it is in its kernel."""
    if node.op != "call_function" or _is_within(node, fused):
        return 0
    known = _recompute_cost(node, storages, cost, ())
    if known == 0:
        return 0
    return cost(node, _reads_of(node, fused) if node in fused else None)


def _is_within(node: fx.Node, fused: Collection[fx.Node]) -> bool:
    return node in fused and all(user in fused for user in node.users)


def _reads_of(node: fx.Node, fused: Collection[fx.Node]) -> set[fx.Node]:
    """Return what the kernel of a fused node reads: through what it computes on the way."""
    found: set[fx.Node] = set()
    queue = list(node.all_input_nodes)
    while queue:
        source = queue.pop()
        if _is_within(source, fused):
            queue.extend(source.all_input_nodes)
        else:
            found.add(source)
    return found


def is_random(node: fx.Node) -> bool:
    """Return whether `node` draws random numbers, or is no op whose effects are known: never run twice."""
    op = op_of(node)
    return op is None or torch.Tag.nondeterministic_seeded in op.tags or schema_of(op).is_mutable


def rounded(size: int) -> int:
    """Return what torch's allocator takes for `size` bytes.

    >>> rounded(1), rounded(512), rounded(513)
    (512, 512, 1024)
    """
    return -(-size // ROUNDING) * ROUNDING
