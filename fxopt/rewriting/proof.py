"""Prove a rewrite on the spot: the stock nodes and the op that replaces them, on the same random inputs.

Three runs: the stock arithmetic in float64 (the oracle; in float32 where an input is too large), the stock
arithmetic in the model's dtype, and the replacement as it will run, on its device. Outputs and all gradients
are compared by the relative norm ||a - oracle|| / ||oracle||, what is zero but for the oracle's own rounding
(a query's gradient with one key) by the norm of the largest of its sort; the replacement's error may be twice the
stock's own, or one rounding of the dtype where stock has less. A second comparison with everything in
float32 catches what rounding in a narrow dtype would hide. It has few tokens, the first as many as memory permits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import fx

from fxopt.graph import vocabulary
from fxopt.graph.torch_private import unset_fake_temporarily
from fxopt.report.records import Proof
from fxopt.rewriting.comparison import Comparison, compare_values
from fxopt.rewriting.drawn import Drawn, draw_few, draw_many
from fxopt.rewriting.modes import Autocast, autocast_of, uncached_autocast
from fxopt.rewriting.pattern import Call, Match, Replacement
from fxopt.rewriting.proof_sizes import extents_of, fits_conditions, symbols_of
from fxopt.rewriting.runs import (
    Runner,
    Values,
    as_dtype,
    read_by,
    replacement_run,
    run_with_gradients,
    stock_run,
)
from fxopt.rewriting.samples import layout_of
from fxopt.rewriting.trees import items_of
from fxopt.sentences import sentence_of

ROUNDING = 0.5
"""What is allowed whatever stock's own error, in epsilons of the coarsest dtype: one rounding to nearest.

Over the examples of all patterns and three draws each, on a CPU, 6 of 453 errors in bfloat16 and float16 were
more than twice stock's own (losses, whose errors happened to cancel in stock), the largest 3.0e-4, which is
0.04 epsilons. Of all errors the largest was 0.84 epsilons, with more than half of that in stock."""
FLOAT32_ERROR = 1e-5
"""What is allowed in float32 whatever stock's own error: sums in another order have some 1e-7 each.

In the same runs the largest of 651 errors in float32 was 1.8e-7. The smallest planted error is 1e-3."""
MOST_ORACLE_BYTES = 2**30
"""The most bytes of one input in float64; the oracle of a larger one is computed in float32."""
Rehearse = Callable[[torch.device], contextlib.AbstractContextManager[bool]]
"""Returns a context in which ops make ready what they need and compute nothing of use; yields whether to bother."""


@dataclasses.dataclass(frozen=True)
class _Proven:
    """A proof, how large the inputs of its match were, and what it ran on for each symbol, in both comparisons."""

    proof: Proof
    extents: tuple[tuple[int, ...], ...]
    symbols: tuple[tuple[int, ...], ...]

    def covers(self, match: Match) -> bool:
        """Return whether a match of this structure is no larger, and ran the same branches of the sizes.

        A proof that could not run says nothing of other sizes.
        """
        if not self.symbols:
            return extents_of(match) == self.extents
        names = symbols_of(match)
        pairs = zip(extents_of(match), self.extents, strict=True)
        return all(
            size <= proven for new, old in pairs for size, proven in zip(new, old, strict=True)
        ) and all(
            len(names) <= len(values) and fits_conditions(match, dict(zip(names, values, strict=False)))
            for values in self.symbols
        )


class Prover:
    """Proves matches: one of the same structure that is no larger than one proven before is not proven again."""

    def __init__(self, rehearse: Rehearse = lambda _: contextlib.nullcontext(False)) -> None:
        self._proofs: dict[Any, list[_Proven]] = {}
        self._rehearse = rehearse
        self._rehearsed: set[Any] = set()

    def prove(self, match: Match, replacement: Replacement) -> Proof:
        """Return the proof of one rewrite; the user's random state and modes stay as they are."""
        if _device_of(match).type == "meta":
            return prove(match, replacement)[0]
        known = self._proofs.setdefault(structure_of(match, replacement), [])
        found = next((proven.proof for proven in known if proven.covers(match)), None)
        if found is None:
            found, symbols = prove(match, replacement)
            known.append(_Proven(found, extents_of(match), symbols))
        return found

    def rehearse(self, match: Match, replacement: Replacement) -> Proof:
        """Run what a proof would run, inside the context that this prover was given; says nothing of the rewrite."""
        structure = structure_of(match, replacement)
        key = structure, extents_of(match)
        if key not in self._rehearsed and not any(p.covers(match) for p in self._proofs.get(structure, ())):
            self._rehearsed.add(key)
            device, autocast = _device_of(match), autocast_of(match)
            with _undisturbed(device), self._rehearse(device) as is_needed:
                if is_needed:
                    _run_replacement(match, replacement, autocast)
        return Proof(True, "", "", 0.0, 0.0, "", (), (), "a rehearsal", "")


def prove(match: Match, replacement: Replacement) -> tuple[Proof, tuple[tuple[int, ...], ...]]:
    """Return the figures of `replacement` against the stock nodes of `match`, and what it ran on for each symbol."""
    dtype = str(match.output.dtype).removeprefix("torch.")
    device = _device_of(match)
    if device.type == "meta":
        return Proof(True, dtype, "meta", 0.0, 0.0, "", (), (), "not proven on meta", ""), ()
    autocast = autocast_of(match)
    with _undisturbed(device):
        try:
            few, many = draw_few(match, autocast), draw_many(match, autocast)
            many = many or few
            comparisons, oracle_dtype = _compare(match, replacement, autocast, few, many)
        except Exception as error:
            reason = f"the proof could not run: {type(error).__name__}: {sentence_of(error)}"
            return Proof(False, dtype, str(device), math.inf, 0.0, "", (), (), reason, ""), ()
    worst = max(comparisons, key=lambda comparison: comparison.excess)
    passed = worst.excess <= 1
    where = f"{worst.name}, a zero, so of the largest" if worst.is_zero else worst.name
    reason = "" if passed else f"{where}: error {worst.error:.2e}, allowed {worst.allowed:.2e}"
    compared = tuple(comparison.name for comparison in comparisons)
    proof = Proof(
        passed,
        dtype,
        str(device),
        worst.error,
        worst.stock_error,
        where,
        compared,
        _shapes_of(few, many),
        reason,
        str(oracle_dtype).removeprefix("torch."),
    )
    return proof, tuple(tuple(drawn.sizes.symbols.values()) for drawn in (few, many))


def _shapes_of(few: Drawn, many: Drawn) -> tuple[str, ...]:
    """Return the shapes of each input that is a tensor, in both comparisons where they differ."""
    shapes: list[str] = []
    for node, value in few.inputs.items():
        if isinstance(value, torch.Tensor):
            both = dict.fromkeys(str(list(drawn.inputs[node].shape)) for drawn in (few, many))
            shapes.append(f"{node.name}: {' and '.join(both)}")
    return tuple(shapes)


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Generator[None]:
    """Run the body with gradients, without autocast, in full float32; all is as before afterwards.

    Stock attention runs without cuDNN, which builds a plan for each shape in 0.8 s a pass: whichever of torch's
    implementations computes it, it is the stock arithmetic.
    """
    devices = [device] if device.type == "cuda" else []
    off = torch.autocast(device.type, enabled=False)
    matmul: Any = torch.backends.cuda.matmul
    precision = matmul.fp32_precision
    with_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    random: Any = torch.random
    with unset_fake_temporarily(), random.fork_rng(devices=devices), torch.enable_grad(), off:
        matmul.fp32_precision = "ieee"
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            yield
        finally:
            matmul.fp32_precision = precision
            torch.backends.cuda.enable_cudnn_sdp(with_cudnn)


@contextlib.contextmanager
def _without_chance(device: torch.device) -> Generator[None]:
    """Run the body, which must draw no random numbers: two runs of what does cannot be compared."""
    before = _random_state(device)
    yield
    if not torch.equal(_random_state(device), before):
        raise RuntimeError("the stock code draws random numbers, expected what computes the same each time")


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _fingerprints(inputs: dict[fx.Node, Any]) -> dict[str, Any]:
    tensors = ((node.name, value) for node, value in inputs.items() if isinstance(value, torch.Tensor))
    return {
        name: torch.hash_tensor(_parts_of(value.detach())).view(torch.int64).item()
        for name, value in tensors
        if value.numel()
    }


def _parts_of(value: torch.Tensor) -> torch.Tensor:
    """Return `value`, complex numbers as pairs of real ones: torch hashes these only."""
    return torch.view_as_real(value) if value.is_complex() else value


def _check_unchanged(inputs: dict[fx.Node, Any], before: dict[str, int]) -> None:
    after = _fingerprints(inputs)
    written = [name for name, value in before.items() if after[name] != value]
    if written:
        raise RuntimeError(f"the replacement or the stock code writes to its input {written[0]}")


def _compare(
    match: Match, replacement: Replacement, autocast: Autocast, few: Drawn, many: Drawn
) -> tuple[list[Comparison], torch.dtype]:
    """Return how far all values are off: of many tokens in the model's dtype, and of few in float32."""
    before = [_fingerprints(drawn.inputs) for drawn in (few, many)]
    oracle, oracle_dtype = _run_oracle(match, many)
    with uncached_autocast(autocast):
        by_stock = _run(match, stock_run(match, many.sizes, None), many)
        by_new = _run(match, replacement_run(replacement, many.sizes, None), many)
    floor = max(ROUNDING * _coarsest_eps(match), FLOAT32_ERROR)
    comparisons = compare_values(by_new, by_stock, oracle, floor)
    del by_stock, by_new
    if few is not many:
        oracle, oracle_dtype = _run_oracle(match, few)
    wide = as_dtype(few.inputs, torch.float32)
    by_stock = oracle
    if oracle_dtype != torch.float32:
        by_stock = _run(match, stock_run(match, few.sizes, torch.float32), few, wide)
    by_new = _run(match, replacement_run(replacement, few.sizes, torch.float32), few, wide)
    for drawn, written in zip((few, many), before, strict=True):
        _check_unchanged(drawn.inputs, written)
    comparisons += compare_values(by_new, by_stock, oracle, FLOAT32_ERROR, " in float32")
    return comparisons, oracle_dtype


def _run_oracle(match: Match, drawn: Drawn) -> tuple[dict[str, torch.Tensor], torch.dtype]:
    dtype = torch.float64 if _largest_float(drawn.inputs) * 8 <= MOST_ORACLE_BYTES else torch.float32
    with _without_chance(_device_of(match)):
        exact = as_dtype(drawn.inputs, dtype)
        return _run(match, stock_run(match, drawn.sizes, dtype), drawn, exact), dtype


def _run(match: Match, run: Runner, drawn: Drawn, inputs: Values | None = None) -> dict[str, torch.Tensor]:
    """Return what `run` makes of what was drawn, or of `inputs` in its place, with all gradients."""
    given = drawn.inputs if inputs is None else inputs
    return run_with_gradients(read_by(match, run), given, drawn.gradients)


def _run_replacement(match: Match, replacement: Replacement, autocast: Autocast) -> None:
    few, many = draw_few(match, autocast), draw_many(match, autocast)
    many = many or few
    with uncached_autocast(autocast):
        _run(match, replacement_run(replacement, many.sizes, None), many)
    wide = as_dtype(few.inputs, torch.float32)
    _run(match, replacement_run(replacement, few.sizes, torch.float32), few, wide)


def _largest_float(inputs: Mapping[fx.Node, Any]) -> int:
    floats = (v for v in inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point())
    return max((value.numel() for value in floats), default=0)


def _coarsest_eps(match: Match) -> float:
    """Return the epsilon of the narrowest float dtype in the matched arithmetic."""
    values = (node.meta.get("example_value") for node in (*match.inputs, *match.nodes))
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    return max((torch.finfo(value.dtype).eps for value in tensors if value.is_floating_point()), default=0.0)


def _device_of(match: Match) -> torch.device:
    return match.output.device


def structure_of(match: Match, replacement: Replacement) -> Any:
    """Return what a proof depends on: ops, attributes, dtypes, layouts, gradients, device; not sizes."""
    places = {node: place for place, node in enumerate((*match.inputs, *match.nodes))}

    def erase(value: Any) -> Any:
        match value:
            case fx.Node():
                return ("node", places.get(value, -1))
            case Call():
                return (value.target, erase(value.args), erase_attributes(value))
            case list() | tuple():
                return tuple(map(erase, items_of(value)))
            case int() | float() | str() | None | torch.dtype():
                return value
            case _:
                return str(value)

    def erase_attributes(called: fx.Node | Call) -> Any:
        is_reshape = called.target is vocabulary.reshape
        return tuple(
            (name, len(items_of(value)) if is_reshape and name == "shape" else erase(value))
            for name, value in called.kwargs.items()
        )

    device = _device_of(match)
    examples = (node.meta.get("example_value") for node in (*match.inputs, *match.nodes))
    forms = tuple(
        (value.dtype, layout_of(value), value.requires_grad) if isinstance(value, torch.Tensor) else "number"
        for value in examples
    )
    calls = tuple((node.target, erase(node.args), erase_attributes(node)) for node in match.nodes)
    outputs = tuple(places[node] for node in (*match.outputs, *match.exports.values()))
    return (match.pattern.name, device, forms, calls, outputs, erase(replacement), autocast_of(match))
