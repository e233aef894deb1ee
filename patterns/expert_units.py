"""The gated unit inside experts: the op that `patterns/glu.py` made of it, and its attributes."""

from __future__ import annotations

from typing import Any

from fxopt.kernels.glu import glu as fused_glu
from fxopt.rewriting.pattern import Match
from fxopt.rewriting.terms import Term, named, operation

FORM = ("act", "alpha", "gate_scale", "gate_limit", "up_limit", "up_offset", "scale", "layout", "gate_first")


def unit_of(*products: Term) -> Term:
    """Return the unit of the first products, one of both gate and up or two, in whichever form."""
    return named("unit", operation(fused_glu, *products, **dict.fromkeys(FORM, ...)))


def form_of(m: Match) -> dict[str, Any]:
    """Return the attributes of the unit that was found."""
    return {name: value for name, value in m["unit"].kwargs.items() if name in FORM}
