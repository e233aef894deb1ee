"""Sizes and contestants of `activation`."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from benchmarks.cases.case import ROWS, Case, Function, tensor
from fxopt.kernels import activation

WIDTH = 16384


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def relu2(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def make_cases() -> list[Case]:
    """Return the activations timed, alone: what is gained around them is bytes, not ms."""
    eager: dict[str, tuple[str, Function]] = {
        "gelu": ("gelu", F.gelu),
        "gelu_new": ("gelu_tanh", gelu_new),
        "relu2": ("relu2", relu2),
    }
    return [make_case(name, act, function) for name, (act, function) in eager.items()]


def make_case(name: str, act: str, eager: Function) -> Case:
    """Return the case of one activation; it reads one tensor and writes one, and backward reads one more."""

    contestants: dict[str, Function] = {
        "fxopt": lambda x: activation.activation(x, act=act),
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    size = ROWS * WIDTH * 2
    return Case(
        "activation",
        f"{ROWS} x {WIDTH} {name}",
        lambda rows: [tensor(rows, WIDTH)],
        contestants,
        2 * size,
        3 * size,
    )
