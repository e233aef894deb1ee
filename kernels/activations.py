"""The activation functions that `glu` and `activation` share: references, gradients, and their part of a kernel.

    silu           x * sigmoid(x)
    sigmoid_alpha  x * sigmoid(alpha x)                                  alpha 1.702: "quick GELU"
    gelu           x * (1 + erf(x / sqrt 2)) / 2
    gelu_tanh      x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2
    relu2          relu(x)^2
    relu           x where it is positive, else 0
    sigmoid        1 / (1 + exp(-x))

Numerics: all in the dtype of `x`, which callers widen to fp32 first. Kernels use 1 + tanh(u) = 2 sigmoid(2 u),
which is exact. A NaN stays one through every function, and relu's gradient passes there, as torch's does.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fxopt.kernels.launch import jit, tl

ACTIVATIONS = ("silu", "sigmoid_alpha", "gelu", "gelu_tanh", "relu2", "relu", "sigmoid")


def activate(x: Tensor, act: str, alpha: float = 1.0) -> Tensor:
    """Return the activation `act` of `x`, differentiable, in plain torch.

    >>> activate(torch.tensor([-1.0, 3.0]), "relu2")
    tensor([0., 9.])
    """
    match act:
        case "silu":
            return F.silu(x)
        case "sigmoid_alpha":
            return x * torch.sigmoid(alpha * x)
        case "gelu" | "gelu_tanh":
            return F.gelu(x, approximate=_approximate(act))
        case "relu2":
            return F.relu(x).square()
        case "relu":
            return F.relu(x)
        case _:
            return torch.sigmoid(x)


def activate_backward(dy: Tensor, x: Tensor, act: str, alpha: float = 1.0) -> Tensor:
    """Return the gradient of `x` where `dy` is that of `activate(x, act, alpha)`, in plain torch."""
    match act:
        case "silu":
            return torch.ops.aten.silu_backward(dy, x)
        case "sigmoid_alpha":
            gate = torch.sigmoid(alpha * x)
            return dy * (gate + alpha * x * gate * (1 - gate))
        case "gelu" | "gelu_tanh":
            return torch.ops.aten.gelu_backward(dy, x, approximate=_approximate(act))
        case "relu2":
            return torch.ops.aten.threshold_backward(dy * 2 * F.relu(x), x, 0)
        case "relu":
            return torch.ops.aten.threshold_backward(dy, x, 0)
        case _:
            return torch.ops.aten.sigmoid_backward(dy, torch.sigmoid(x))


def _approximate(act: str) -> str:
    return "tanh" if act == "gelu_tanh" else "none"


def check_activation(op: str, act: str) -> None:
    """Raise a ValueError that names `op` if `act` is not one of `ACTIVATIONS`."""
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: act, expected one of {ACTIVATIONS}, got {act!r}")


@jit
def act_forward(b_x, alpha, ACT: tl.constexpr):
    """Return the activation of a tile in fp32."""
    if ACT == "silu":
        b_act = b_x * tl.sigmoid(b_x)
    elif ACT == "sigmoid_alpha":
        b_act = b_x * tl.sigmoid(alpha * b_x)
    elif ACT == "gelu":
        b_act = b_x * (0.5 + 0.5 * tl.erf(b_x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        b_act = b_x * tl.sigmoid(1.5957691216057308 * b_x * (1 + 0.044715 * b_x * b_x))
    elif ACT == "relu2":
        b_positive = tl.where(b_x <= 0, 0.0, b_x)  # a NaN is not below 0
        b_act = b_positive * b_positive
    elif ACT == "relu":
        b_act = tl.where(b_x <= 0, 0.0, b_x)
    else:
        b_act = tl.sigmoid(b_x)
    return b_act


@jit
def sigmoid_of(b_x, APPROXIMATE: tl.constexpr):
    """Return the sigmoid in fp32; if APPROXIMATE, its reciprocal is the square of a reciprocal root, 2^-21 off.

    A division takes twice the instructions.
    """
    if APPROXIMATE:
        b_root = tl.rsqrt(1.0 + tl.exp2(b_x * -1.4426950408889634))
        b_sigmoid = b_root * b_root
    else:
        b_sigmoid = tl.sigmoid(b_x)
    return b_sigmoid


@jit
def act_backward(b_dact, b_x, alpha, ACT: tl.constexpr, APPROXIMATE: tl.constexpr):
    """Return the activation of a tile in fp32, and the gradient of `b_x` for `b_dact`, that of the activation.

    APPROXIMATE is for what is rounded to 16 bits in the end.
    """
    if ACT == "silu":
        b_sigmoid = sigmoid_of(b_x, APPROXIMATE)
        b_act = b_x * b_sigmoid
        b_dx = b_dact * (b_sigmoid + b_act * (1 - b_sigmoid))
    elif ACT == "sigmoid_alpha":
        b_sigmoid = sigmoid_of(alpha * b_x, APPROXIMATE)
        b_act = b_x * b_sigmoid
        b_dx = b_dact * (b_sigmoid + alpha * b_act * (1 - b_sigmoid))
    elif ACT == "gelu":
        b_normal = 0.5 + 0.5 * tl.erf(b_x * 0.7071067811865476)
        b_act = b_x * b_normal
        b_dx = b_dact * (b_normal + b_x * (0.3989422804014327 * tl.exp(-0.5 * b_x * b_x)))
    elif ACT == "gelu_tanh":
        b_square = b_x * b_x
        b_sigmoid = sigmoid_of(1.5957691216057308 * b_x * (1 + 0.044715 * b_square), APPROXIMATE)
        b_act = b_x * b_sigmoid
        b_inner = 1.5957691216057308 * (1 + 0.134145 * b_square)
        b_dx = b_dact * (b_sigmoid + b_act * (1 - b_sigmoid) * b_inner)
    elif ACT == "relu2":
        b_positive = tl.where(b_x <= 0, 0.0, b_x)
        b_act = b_positive * b_positive
        b_dx = tl.where(b_x <= 0, 0.0, b_dact * (2 * b_positive))  # whatever b_dact is, as in torch
    elif ACT == "relu":
        b_act = tl.where(b_x <= 0, 0.0, b_x)
        b_dx = tl.where(b_x <= 0, 0.0, b_dact)
    else:
        b_act = sigmoid_of(b_x, APPROXIMATE)
        b_dx = b_dact * (b_act * (1 - b_act))
    return b_act, b_dx
