"""The sizes that a match is proven at: few tokens, and more of them than a tile of a kernel usually takes.

Leading dims of activations are shrunk, all by the same rule; dims that weights have stay as they are. A size that
changes between calls is grown beyond what it was at capture: a kernel that leaves out what its first tile does not
reach is right on few rows. Sizes keep what they leave when divided by 16 where they can, since Triton compiles a kernel
anew for those that leave nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.graph import vocabulary
from fxopt.graph.torch_private import conditions_on, evaluate, expression_of, numbers_at_capture
from fxopt.graph.view import is_tensor
from fxopt.rewriting.pattern import Match

FEW_TOKENS = 6
"""What leading dims shrink to, each to one more: enough for shifts and for rows to be ignored."""
MANY = 64
"""Sizes beyond are numbers of tokens, where shrinking all leading dims does not work: those up to it, of heads."""
LIMITS = (1024, 256, 80)
"""What leading dims are cut to, or grown to where they change, in the second proof: the first that memory permits.

Tiles hold up to 64 or 128 rows, and the least of these is more than 64."""
FEW_BESIDE = 3
"""What all other leading dims shrink to where only one can be large."""
CLASSES = 24576
"""What the classes of a loss are cut to: more than a kernel takes at a time, a sixth of what large heads have."""
MOST_ITEMS = 2**22
"""Of one activation in the second proof: 32 MiB in float64. The first has no limit, and needs none."""
SIZE_CLASS = 16
WEIGHT_RANK = 2

Symbols = Mapping[Any, int]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What becomes of the sizes of one match: plain numbers by number, symbols by their names.

    `classes` are numbers too, of a loss: weights have them as rows, and activations as last dims.
    """

    numbers: Mapping[int, int]
    symbols: Symbols
    shrinks_last: bool = False
    classes: Mapping[int, int] = dataclasses.field(default_factory=dict[int, int])

    def of(self, size: Any) -> int:
        """Return the size that stands for `size`."""
        if isinstance(size, int):
            return self.numbers.get(size, self.classes.get(size, size))
        return int(evaluate(expression_of(size), self.symbols))

    def of_shape(self, shape: Sequence[Any]) -> tuple[int, ...]:
        """Return what stands for a shape: leading sizes shrunk, a plain last one only where that is wanted."""
        return tuple(
            self.of(size)
            if place < len(shape) - 1 or self.shrinks_last or not isinstance(size, int)
            else self.classes.get(size, size)
            for place, size in enumerate(shape)
        )

    def of_weight(self, shape: Sequence[Any]) -> tuple[int, ...]:
        """Return what stands for the shape of a weight: of plain sizes, rows that are classes are cut."""
        return tuple(
            self.of(size) if not isinstance(size, int) else size if place else self.classes.get(size, size)
            for place, size in enumerate(shape)
        )


def propose_few(match: Match) -> Iterator[Sizes]:
    """Yield sizes to try, smallest first; the last are those of the capture and always fit."""
    yield from _with_classes(match, _propose_few(match))
    yield from _propose_few(match)


def _propose_few(match: Match) -> Iterator[Sizes]:
    symbols = symbols_of(match)
    few = {symbol: min(size, FEW_TOKENS + place) for place, (symbol, size) in enumerate(symbols.items())}
    grown = (_grow(symbols, limit) for limit in reversed(LIMITS))
    small = next((known for known in (few, *grown) if fits_conditions(match, known)), symbols)
    leading = _leading_sizes(match, floats=True)
    numbers = {size: min(size, FEW_TOKENS + place) for place, size in enumerate(leading)}
    yield from _variants(match, numbers, small)
    if symbols:
        yield Sizes({}, small)
    yield Sizes({}, symbols)


def propose_many(match: Match) -> Iterator[Sizes]:
    """Yield sizes to try that are larger and keep each activation within `MOST_ITEMS`, the largest first."""
    for sizes in itertools.chain(_with_classes(match, _propose_many(match)), _propose_many(match)):
        if _most_items(match, sizes) <= MOST_ITEMS:
            yield sizes


def _with_classes(match: Match, proposals: Iterator[Sizes]) -> Iterator[Sizes]:
    """Yield `proposals` with the classes of the loss in `match` cut, nothing where there are none to cut."""
    logits = [node.args[0] for node in match.nodes if node.target is F.cross_entropy]
    numbers = [node.meta["example_value"].shape[-1] for node in logits if isinstance(node, fx.Node)]
    classes = {
        size: _cut(size, size, CLASSES, 0) for size in numbers if isinstance(size, int) and size > CLASSES
    }
    if classes:
        yield from (dataclasses.replace(sizes, classes=classes) for sizes in proposals)


def _propose_many(match: Match) -> Iterator[Sizes]:
    symbols = symbols_of(match)
    leading = [size for size in _leading_sizes(match, floats=True) if size not in _stacked_sizes(match)]
    names = [*leading, *symbols]
    of = {**{size: size for size in leading}, **symbols}
    wholes = [
        {name: _cut(name, of[name], limit, place) for place, name in enumerate(names)} for limit in LIMITS
    ]
    beside = {name: min(of[name], FEW_BESIDE + place) for place, name in enumerate(names)}
    large = [name for name in names if wholes[-1][name] > MANY]
    singles = [{**beside, name: wholes[-1][name]} for name in large if len(names) > 1]
    for chosen in (*wholes, *singles):
        known = {symbol: chosen[symbol] for symbol in symbols}
        if fits_conditions(match, known):
            yield from _variants(match, {size: chosen[size] for size in leading}, known)


def _cut(name: Any, size: int, limit: int, place: int) -> int:
    """Return the size up to a limit that is of the class of `size`: a plain one is never grown."""
    cut = limit + SIZE_CLASS * place - (limit - size) % SIZE_CLASS
    return min(size, cut) if isinstance(name, int) else cut


def _grow(symbols: Symbols, limit: int) -> Symbols:
    return {symbol: _cut(symbol, size, limit, place) for place, (symbol, size) in enumerate(symbols.items())}


def _variants(match: Match, numbers: Mapping[int, int], symbols: Symbols) -> Iterator[Sizes]:
    """Yield sizes in which leading dims become `numbers`, and then those in which last dims of tokens do too."""
    stacked, leading = _stacked_sizes(match), list(numbers)
    folded = dict(numbers)
    for shift in range(3):
        for b in leading:
            shrunk = max(numbers[b] - shift, 1)
            folded.setdefault(b - shift, shrunk)
            for a in leading:
                if stacked.isdisjoint((a, b)):  # a stack's matrices are not counted in tokens
                    folded.setdefault(a * (b - shift), numbers[a] * shrunk)
    for size in _leading_sizes(match, floats=False):
        divisors = [b for b in numbers if size % b == 0 and b not in stacked]
        tokens = max(divisors, default=None)  # several things per token
        repeated = min(size, FEW_TOKENS) if tokens is None else numbers[tokens] * (size // tokens)
        folded.setdefault(size, repeated)
    yield Sizes({**folded, 1: 1}, symbols)
    many = {size: shrunk for size, shrunk in numbers.items() if size > MANY}
    if many:
        yield Sizes({**many, 1: 1}, symbols, shrinks_last=True)


def fits_conditions(match: Match, symbols: Symbols) -> bool:
    """Return whether capture's conditions on the sizes of `match` hold for these, as far as they say all.

    A branch on a size in the model, or in a replacement that was evaluated, is such a condition: what runs is the
    branch that was taken, so it is what has to be proven.
    """
    sizes = itertools.chain.from_iterable(map(_symbolic_sizes, _values(match)))
    conditions = conditions_on(next(sizes, None))
    relevant = (asked for asked in conditions if asked.free_symbols <= symbols.keys())
    try:
        return all(evaluate(asked, symbols) for asked in relevant)
    except ZeroDivisionError:
        return False


def extents_of(match: Match) -> tuple[tuple[int, ...], ...]:
    """Return how large the inputs of `match` are: of leading dims no more is told than is proven at most."""

    def extent(size: Any, is_cut: bool) -> int:
        return LIMITS[0] if not isinstance(size, int) else min(size, LIMITS[0]) if is_cut else size

    extents: list[tuple[int, ...]] = []
    for node in match.inputs:
        if is_tensor(node):
            shape, is_whole = node.meta["example_value"].shape, is_weight(node)
            last = len(shape) - 1
            extents.append(tuple(extent(s, not is_whole and place < last) for place, s in enumerate(shape)))
    return tuple(extents)


def symbols_of(match: Match) -> dict[Any, int]:
    """Return the symbols in the sizes of `match`, each with the number it had at capture."""
    found: dict[Any, int] = {}
    for size in itertools.chain.from_iterable(map(_symbolic_sizes, _values(match))):
        known = numbers_at_capture(size)
        for symbol in sorted(expression_of(size).free_symbols, key=str):
            found[symbol] = int(known.get(symbol, FEW_TOKENS))
    return found


def _values(match: Match) -> Iterator[Any]:
    return (node.meta.get("example_value") for node in (*match.inputs, *match.nodes))


def _symbolic_sizes(value: Any) -> list[Any]:
    sizes: list[Any] = list(value.shape) if isinstance(value, torch.Tensor) else [value]
    return [size for size in sizes if getattr(size, "node", None) is not None]


def _most_items(match: Match, sizes: Sizes) -> int:
    nodes = (node for node in (*match.inputs, *match.nodes) if is_tensor(node) and not is_weight(node))
    return max((math.prod(sizes.of_shape(node.meta["example_value"].shape)) for node in nodes), default=0)


def _stacked_sizes(match: Match) -> set[int]:
    firsts = [node.meta["example_value"].shape[0] for node in match.inputs if is_stack_of_matrices(node)]
    return {size for size in firsts if isinstance(size, int)}


def _leading_sizes(match: Match, *, floats: bool) -> list[int]:
    """Return the plain sizes of the leading dims of activations, or all those of the integer inputs."""
    sizes: dict[int, None] = {}
    for node in match.inputs:
        if not is_tensor(node) or is_weight(node):
            continue
        example = node.meta["example_value"]
        if example.is_floating_point() == floats:
            dims = example.shape[:-1] if floats else example.shape
            if is_stack_of_matrices(node):
                dims = example.shape[:1]
            sizes.update(dict.fromkeys(size for size in dims if isinstance(size, int) and size > 1))
    return list(sizes)


def is_weight(node: fx.Node) -> bool:
    """Return whether a node looks like a parameter: a vector or matrix that comes into the graph as it is.

    It may be in codes of eight bits, and be cast or decoded from what came in, or be a view of it. One whose rows
    are picked by integers counts as tokens do: how many rows there are is no matter.
    """
    example = node.meta.get("example_value")
    if not isinstance(example, torch.Tensor) or example.dim() > WEIGHT_RANK or _is_indexed(node):
        return False
    is_weighty = example.is_floating_point() or example.dtype == torch.uint8
    if node.op in ("placeholder", "get_attr"):
        return is_weighty
    return (
        node.op == "call_function"
        and is_weighty
        and bool(node.all_input_nodes)
        and all(
            source.op in ("placeholder", "get_attr") and is_weight(source) for source in node.all_input_nodes
        )
    )


def is_stack_of_matrices(node: fx.Node) -> bool:
    """Return whether a node holds one matrix per group of rows: of these there may be fewer."""
    example = node.meta.get("example_value")
    if not isinstance(example, torch.Tensor) or example.dim() != WEIGHT_RANK + 1:
        return False
    return _is_indexed(node) or any(
        user.target is vocabulary.grouped_mm and user.args[1] is node for user in node.users
    )


def _is_indexed(node: fx.Node) -> bool:
    """Return whether a tensor of integers picks items of `node`."""
    return any(
        user.target is operator.getitem and user.args[0] is node and is_tensor(user.args[1])
        for user in node.users
    )
