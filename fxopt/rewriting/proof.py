"""Prove a rewrite on the spot: the stock nodes and the op that replaces them, on the same random inputs.

Three runs: the stock arithmetic in float64 (the oracle; in float32 where an input is too large), the stock
arithmetic in the model's dtype, and the replacement as it will run, on its device. Outputs and all gradients
are compared by the relative norm ||a - oracle|| / ||oracle||; the replacement's error may be twice the
stock's own, or one rounding of the dtype where stock has less. A second comparison with everything in
float32 catches what rounding in a narrow dtype would hide.
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
from fxopt.rewriting.modes import Autocast, autocast_of, uncached_autocast
from fxopt.rewriting.pattern import Call, Match, Replacement
from fxopt.rewriting.runs import Runner, Values, as_dtype, replacement_run, run_with_gradients, stock_run
from fxopt.rewriting.samples import GRADIENT_SEED, Sampler, Sizes, layout_of, propose_sizes
from fxopt.rewriting.trees import items_of

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


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far one value of the replacement, and of the stock run, is from the oracle, and what is allowed."""

    name: str
    error: float
    stock_error: float
    allowed: float

    @property
    def excess(self) -> float:
        """How many times the allowed error was reached; above 1 the proof fails."""
        return self.error / self.allowed if math.isfinite(self.error) else math.inf


Rehearse = Callable[[torch.device], contextlib.AbstractContextManager[bool]]
"""Returns a context in which ops make ready what they need and compute nothing of use; yields whether to bother."""


class Prover:
    """Proves matches, each distinct structure once: sizes do not count; dtypes, layouts, attributes do."""

    def __init__(self, rehearse: Rehearse = lambda _: contextlib.nullcontext(False)) -> None:
        self._proofs: dict[Any, Proof] = {}
        self._rehearse = rehearse
        self._rehearsed: set[Any] = set()

    def prove(self, match: Match, replacement: Replacement) -> Proof:
        """Return the proof of one rewrite; the user's random state and modes stay as they are."""
        if _device_of(match).type == "meta":
            return prove(match, replacement)
        key = structure_of(match, replacement)
        if key not in self._proofs:
            self._proofs[key] = prove(match, replacement)
        return self._proofs[key]

    def rehearse(self, match: Match, replacement: Replacement) -> Proof:
        """Run what a proof would run, inside the context that this prover was given; says nothing of the rewrite."""
        key = structure_of(match, replacement)
        if key not in self._proofs and key not in self._rehearsed:
            self._rehearsed.add(key)
            device, autocast = _device_of(match), autocast_of(match)
            with _undisturbed(device), self._rehearse(device) as is_needed:
                if is_needed:
                    _run_replacement(match, replacement, autocast)
        return Proof(True, "", "", 0.0, 0.0, "", (), (), "a rehearsal", "")


def prove(match: Match, replacement: Replacement) -> Proof:
    """Return the figures of `replacement` against the stock nodes of `match`."""
    dtype = str(match.output.dtype).removeprefix("torch.")
    device = _device_of(match)
    if device.type == "meta":
        return Proof(True, dtype, "meta", 0.0, 0.0, "", (), (), "not proven on meta", "")
    autocast = autocast_of(match)
    with _undisturbed(device):
        try:
            comparisons, shapes, oracle_dtype = _compare(match, replacement, autocast)
        except Exception as error:
            reason = f"the proof could not run: {type(error).__name__}: {_first_line(error)}"
            return Proof(False, dtype, str(device), math.inf, 0.0, "", (), (), reason, "")
    worst = max(comparisons, key=lambda comparison: comparison.excess)
    passed = worst.excess <= 1
    reason = "" if passed else f"{worst.name}: error {worst.error:.2e}, allowed {worst.allowed:.2e}"
    compared = tuple(comparison.name for comparison in comparisons)
    return Proof(
        passed,
        dtype,
        str(device),
        worst.error,
        worst.stock_error,
        worst.name,
        compared,
        shapes,
        reason,
        str(oracle_dtype).removeprefix("torch."),
    )


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
    match: Match, replacement: Replacement, autocast: Autocast
) -> tuple[list[Comparison], tuple[str, ...], torch.dtype]:
    sizes, inputs = _draw(match, autocast)
    oracle_dtype = torch.float64 if _largest_float(inputs) * 8 <= MOST_ORACLE_BYTES else torch.float32
    gradients = _draw_gradients(match, sizes, inputs, autocast)
    exact = as_dtype(inputs, oracle_dtype)
    with _without_chance(_device_of(match)):
        oracle = run_with_gradients(_read(match, stock_run(match, sizes, oracle_dtype)), exact, gradients)
    del exact
    before = _fingerprints(inputs)
    with uncached_autocast(autocast):
        by_stock = run_with_gradients(_read(match, stock_run(match, sizes, None)), inputs, gradients)
        run_new = _read(match, replacement_run(replacement, sizes, None))
        by_new = run_with_gradients(run_new, inputs, gradients)
    floor = max(ROUNDING * _coarsest_eps(match), FLOAT32_ERROR)
    comparisons = [
        _compare_value(name, by_new.get(name), by_stock[name], oracle[name], floor) for name in oracle
    ]
    del by_stock, by_new
    wide = as_dtype(inputs, torch.float32)
    by_stock = oracle
    if oracle_dtype != torch.float32:
        by_stock = run_with_gradients(_read(match, stock_run(match, sizes, torch.float32)), wide, gradients)
    run_new = _read(match, replacement_run(replacement, sizes, torch.float32))
    by_new = run_with_gradients(run_new, wide, gradients)
    _check_unchanged(inputs, before)
    comparisons += [
        _compare_value(f"{name} in float32", by_new.get(name), by_stock[name], oracle[name], FLOAT32_ERROR)
        for name in oracle
    ]
    shapes = tuple(
        f"{node.name}: {list(value.shape)}"
        for node, value in inputs.items()
        if isinstance(value, torch.Tensor)
    )
    return comparisons, shapes, oracle_dtype


def _read(match: Match, run: Runner) -> Runner:
    """Return `run` as what the pattern compares of its outputs."""
    read_out, num_outputs = match.pattern.read_out, len(match.outputs)
    if read_out is None:
        return run

    def read(inputs: Values) -> list[torch.Tensor]:
        found = run(inputs)
        return [*read_out(match, found[:num_outputs]), *found[num_outputs:]]

    return read


def _run_replacement(match: Match, replacement: Replacement, autocast: Autocast) -> None:
    sizes, inputs = _draw(match, autocast)
    gradients = _draw_gradients(match, sizes, inputs, autocast)
    with uncached_autocast(autocast):
        run_with_gradients(_read(match, replacement_run(replacement, sizes, None)), inputs, gradients)
    wide = as_dtype(inputs, torch.float32)
    run_with_gradients(_read(match, replacement_run(replacement, sizes, torch.float32)), wide, gradients)


def _draw(match: Match, autocast: Autocast) -> tuple[Sizes, Values]:
    """Return the first sizes with which the stock nodes run, and inputs of these sizes."""
    proposals = list(propose_sizes(match))
    for sizes in proposals:
        sampler = Sampler(match, sizes)
        inputs = _with_equal_views({node: sampler.sample(node) for node in match.inputs})
        if sizes is proposals[-1]:
            return sizes, inputs
        with contextlib.suppress(Exception), torch.no_grad(), uncached_autocast(autocast):
            outputs = stock_run(match, sizes, None)(inputs)
            if all(map(_has_form, outputs, match.outputs)):
                return sizes, inputs
    raise AssertionError("there is always a last proposal")


def _with_equal_views(inputs: Values) -> Values:
    """Return `inputs`, those equal that are one integer tensor in two shapes: labels, and labels in rows."""
    for view, value in tuple(inputs.items()):
        source: Any = view.args[0] if view.target in (vocabulary.reshape, vocabulary.contiguous) else None
        if source in inputs and not value.is_floating_point() and value.numel() == inputs[source].numel():
            inputs[source] = value.reshape(inputs[source].shape)
    return inputs


def _has_form(value: torch.Tensor, node: fx.Node) -> bool:
    example = node.meta["example_value"]
    return value.dim() == example.dim() and value.dtype == example.dtype


def _draw_gradients(match: Match, sizes: Sizes, inputs: Values, autocast: Autocast) -> list[torch.Tensor]:
    """Return a gradient for each output, one that the output's dtype holds exactly.

    Drawn apart from the inputs: along x itself the gradient of a norm is all cancellation.
    """
    sampler = Sampler(match, sizes, GRADIENT_SEED)
    with torch.no_grad(), uncached_autocast(autocast):
        outputs = _read(match, stock_run(match, sizes, None))(inputs)
        return [sampler.like(out) if out.is_floating_point() or out.is_complex() else out for out in outputs]


def _largest_float(inputs: Mapping[fx.Node, Any]) -> int:
    floats = (v for v in inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point())
    return max((value.numel() for value in floats), default=0)


def _coarsest_eps(match: Match) -> float:
    """Return the epsilon of the narrowest float dtype in the matched arithmetic."""
    values = (node.meta.get("example_value") for node in (*match.inputs, *match.nodes))
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    return max((torch.finfo(value.dtype).eps for value in tensors if value.is_floating_point()), default=0.0)


def _compare_value(
    name: str, new: torch.Tensor | None, stock: torch.Tensor, oracle: torch.Tensor, floor: float
) -> Comparison:
    if new is None:
        return Comparison(
            f"{name} (none: nothing the replacement returns depends on it)", math.inf, 0.0, floor
        )
    if new.shape != oracle.shape:
        return Comparison(f"{name} (shape {list(new.shape)}, not {list(oracle.shape)})", math.inf, 0.0, floor)
    if new.dtype != stock.dtype:
        return Comparison(f"{name} (dtype {new.dtype}, not {stock.dtype})", math.inf, 0.0, floor)
    stock_error = _relative_error(stock, oracle)
    return Comparison(name, _relative_error(new, oracle), stock_error, max(2 * stock_error, floor))


def _relative_error(value: torch.Tensor, oracle: torch.Tensor) -> float:
    if not (oracle.is_floating_point() or oracle.is_complex()):
        return 0.0 if torch.equal(value, oracle) else math.inf
    norm = oracle.pow(2).sum().sqrt().item()
    distance = (value.to(oracle.dtype) - oracle).pow(2).sum().sqrt().item()
    return distance / norm if norm else distance


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


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
