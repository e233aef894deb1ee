"""Activation between the two projections of an MLP, without a gate -> one op.

Source: transformers `ACT2FN` (gelu, gelu_new, gelu_fast, quick_gelu, silu, relu2), `GPT2MLP`, `NemotronMLP`.
Saved for backward: what the activation reads. Stock saves that and the result, which the next projection needs
for its weight's gradient; spelled out, the tanh form saves five tensors of this size. torch.compile keeps two
for any of them: its partitioner saves what a matrix product of the backward pass reads.
Numerics: in fp32, rounded once.

What is gained even for one call of `F.gelu` is that result: the op is computed again in the backward pass, which
costs one read and one write of a tensor that no longer lives from forward to backward. What an op costs, that
a compiler cannot fuse across it, is paid nowhere: it is rewritten only where nothing but matrix products (and
views, casts, dropout) read it, and a matrix product, perhaps with a bias or an adapter added, made its input.

ReLU, sigmoid and tanh are refused: their gradients are read off their results, which the next projection saves
anyway, so stock saves one tensor already, and the op would save one and compute more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from fxopt.graph.neighbours import comes_from_product, find_fusible_reader
from fxopt.graph.vocabulary import cast as cast_tensor
from fxopt.kernels.activation import activation
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    choice,
    downcast,
    either,
    erf,
    gelu,
    maybe,
    number,
    relu,
    sigmoid,
    silu,
    tanh,
    tensor,
    upcast,
)

SQRT_HALF = math.sqrt(0.5)
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
FROM_RESULT = ("relu", "sigmoid", "tanh")
"""Activations whose gradient is read off their result."""


def search() -> Term:
    """Return act(x) in every spelling, the name bound to `act`."""
    x = maybe(upcast, tensor("x"))
    cube = either(x**3, x * x * x, x * (x**2))
    inner = either((x + cube * 0.044715) * SQRT_2_OVER_PI, x * SQRT_2_OVER_PI * (x * 0.044715 * x + 1))
    return maybe(
        downcast,
        choice(
            "act",
            silu=either(silu(x), x * sigmoid(x)),
            sigmoid_alpha=x * sigmoid(x * number("alpha")),
            gelu=either(gelu(x), half_of(x, erf(either(x * SQRT_HALF, x / math.sqrt(2))))),
            gelu_tanh=either(gelu(x, "tanh"), half_of(x, tanh(inner))),
            relu2=either(relu(x) ** 2, relu(x) * relu(x)),
            relu=relu(x),
            sigmoid=sigmoid(x),
            tanh=tanh(x),
        ),
    )


def half_of(x: Term, curve: Term) -> Term:
    """Return `x * (1 + curve) / 2` in the orders in which it is written."""
    return either(x * 0.5 * (curve + 1), x * (curve + 1) * 0.5, x * ((curve + 1) * 0.5))


def check(m: Match) -> Mismatch | None:
    """Refuse what saves one tensor already, and what a compiler would fuse with its neighbours."""
    if not m.example("x").is_floating_point():
        return m.fail(f"expected floats, got {m.example('x').dtype}", "x")
    reader = find_fusible_reader(m.outputs[0])
    if reader is not None:
        name = getattr(reader.target, "__name__", str(reader.target))
        return m.fail(f"{m['act']} is read by {name}, with which a compiler fuses it, expected a projection")
    if not comes_from_product(m["x"]):
        return m.fail(f"{m['act']} reads {m['x'].name}, expected the result of a projection", "x")
    if m["act"] in FROM_RESULT:
        return m.fail(
            f"the gradient of {m['act']} is read off its result, which the next projection saves anyway: "
            "stock saves one tensor here, and an op would save one and compute more"
        )
    return None


def replace(m: Match) -> Call:
    """Return one call of the fused op, in a dtype no narrower than the model's result."""
    attributes = {"act": m["act"]}
    if m["alpha"] is not None:
        attributes["alpha"] = float(m["alpha"])
    source, dtype = m.example("x").dtype, m.output.dtype
    if source == dtype:
        return call(activation, m["x"], **attributes)
    if torch.promote_types(source, dtype) == source:
        return call(cast_tensor, call(activation, m["x"], **attributes), dtype=dtype)
    return call(activation, call(cast_tensor, m["x"], dtype=dtype), **attributes)


def _silu(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x)


def _times_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return x * x.sigmoid()


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_new(x: torch.Tensor) -> torch.Tensor:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def _gelu_fast(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _gelu_of_bloom(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def _gelu_by_erf(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _relu_squared(x: torch.Tensor) -> torch.Tensor:
    return torch.square(F.relu(x))


def _relu_times_itself(x: torch.Tensor) -> torch.Tensor:
    positive = F.relu(x)
    return positive * positive


def _in_fp32(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x.float()).to(x.dtype)


Act = Callable[[torch.Tensor], torch.Tensor]


def _between_projections(act: Act) -> Callable[..., torch.Tensor]:
    def mlp(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return F.linear(act(F.linear(x, first)), second)

    return mlp


def _with_bias(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    bias = second[:, :1].flatten().new_zeros(first.shape[0])
    y = torch.addmm(bias, x.view(-1, x.shape[-1]), first.t()).view(*x.shape[:-1], -1)
    return F.dropout(F.gelu(y), 0.0) @ second.t()


def _with_adapter(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    y = F.linear(x, first) + F.linear(F.linear(x, first[:4]), first[:, :4]) * 0.5
    y = F.silu(y)
    return F.linear(y, second) + F.linear(F.linear(y, second[:4]), second[:, :4]) * 0.5


def _inputs(device: torch.device, dtype: torch.dtype, width: int = 31) -> tuple[torch.Tensor, ...]:
    shapes = ((2, 5, 12), (width, 12), (12, width))
    return tuple(torch.randn(*shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield the spellings above, each between two projections."""
    acts = (
        *(_silu, _times_sigmoid, _quick_gelu, _gelu, _gelu_tanh, _gelu_new, _gelu_fast, _gelu_of_bloom),
        *(_gelu_by_erf, _relu_squared, _relu_times_itself, _in_fp32),
    )
    for act in acts:
        name = f"{act.__name__.strip('_')} bf16"
        yield name, (_between_projections(act), _inputs(device, torch.bfloat16))
    for act in (_gelu, _gelu_new):
        name = f"{act.__name__.strip('_')} fp32"
        yield name, (_between_projections(act), _inputs(device, torch.float32))
    for function in (_with_bias, _with_adapter):
        yield function.__name__.strip("_").replace("_", " "), (function, _inputs(device, torch.float32))


def near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
    """Yield code that must be left alone, and a part of the reason."""
    x, first, second = _inputs(device, torch.float32)

    def normed(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return F.linear(F.layer_norm(F.gelu(F.linear(x, first)), (31,)), second)

    def unprojected(x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(x), first)

    def escaping(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, ...]:
        positive = F.relu(F.linear(x, first))
        return F.linear(positive.square(), second), positive

    for act in (torch.relu, torch.sigmoid, torch.tanh):
        function = _between_projections(act)
        reason = f"the gradient of {act.__name__} is read off its result"
        yield f"{act.__name__} alone", (function, (x, first, second)), reason
    yield "normed", (normed, (x, first, second)), "gelu is read by layer_norm, with which a compiler fuses it"
    yield "of an input", (unprojected, (x, first)), "expected the result of a projection"
    yield "escaping", (escaping, (x, first, second)), "is also returned"


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield broken activations: they must be left alone, or be computed as they stand."""
    acts: dict[str, Act] = {
        "another cube": lambda x: 0.5 * x * (1 + torch.tanh(SQRT_2_OVER_PI * (x + 0.05 * x**3))),
        "another root": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
        "not halved": lambda x: x * (1 + torch.erf(x * SQRT_HALF)),
        "squared twice": lambda x: F.relu(x) ** 4,
        "cubed": lambda x: F.relu(x) ** 3,
        "sigmoid of a sum": lambda x: x * torch.sigmoid(x + 1),
        "steep": lambda x: x * torch.sigmoid(3 * x),
        "two in a row": lambda x: F.silu(F.gelu(x)),
        "shifted": lambda x: F.gelu(x) + 1,
    }
    for name, act in acts.items():
        yield name, (_between_projections(act), _inputs(device, torch.float32))


ACTIVATION = Pattern(
    name="activation",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    source="transformers ACT2FN, GPT2MLP and NemotronMLP",
    part_of=("glu",),
)
