"""What a unit computes besides its tensors, where its two inputs lie, and what it returns."""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("split", "packed", "interleaved")


@dataclasses.dataclass(frozen=True)
class Form:
    """What a unit computes besides its tensors, in the order of the op's arguments."""

    act: str
    alpha: float = 1.0
    gate_scale: float = 1.0
    gate_limit: float | None = None
    up_limit: float | None = None
    up_offset: float = 0.0
    scale: float = 1.0
    layout: str = "split"
    gate_first: bool = True

    def astuple(self) -> tuple[Any, ...]:
        """Return the values as the op takes them."""
        # Dynamo of torch 2.11 cannot follow dataclasses.astuple, which copies each value.
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def rounded(self, gate: Tensor, up: Tensor | None) -> "Form":
        """Return the form with each limit as torch's clamp takes it: in the dtype of what is cut off.

        >>> Form("silu", gate_limit=0.7).rounded(torch.ones(2, dtype=torch.bfloat16), None).gate_limit
        0.69921875
        """
        if self.gate_limit is None and self.up_limit is None:
            return self
        limits = (
            round_limit(self.gate_limit, gate.dtype),
            round_limit(self.up_limit, (gate if up is None else up).dtype),
        )
        return dataclasses.replace(self, gate_limit=limits[0], up_limit=limits[1])

    def constants(self) -> dict[str, Any]:
        """Return what the kernels are compiled for."""
        return {
            "ACT": self.act,
            "HAS_GATE_SCALE": self.gate_scale != 1.0,
            "HAS_UP_OFFSET": self.up_offset != 0.0,
            "HAS_GATE_LIMIT": self.gate_limit is not None,
            "HAS_UP_LIMIT": self.up_limit is not None,
            "INTERLEAVED": self.layout == "interleaved",
            "GATE_FIRST": self.gate_first,
        }

    def numbers(self) -> tuple[float, ...]:
        """Return what the kernels are told at run time."""
        return (
            self.alpha,
            self.gate_scale,
            self.gate_limit or 0.0,
            self.up_limit or 0.0,
            self.up_offset,
            self.scale,
        )


@functools.cache
def round_limit(limit: float | None, dtype: torch.dtype) -> float | None:
    """Return `limit` rounded to `dtype`."""
    return None if limit is None else torch.tensor(limit, dtype=dtype, device="cpu").item()


@functools.cache
def passes_at_limit() -> bool:
    """Return whether torch's clamp passes a gradient where a value equals its limit: before torch 2.14 it does.

    Half-precision values meet their limit often, so the unit has to do as this torch does.
    """
    with torch.inference_mode(False), torch.enable_grad():
        value = torch.zeros((), requires_grad=True)
        (gradient,) = torch.autograd.grad(value.clamp(max=0.0), value)
    return bool(gradient)


def split_pair(first: Tensor, second: Tensor | None, form: Form) -> tuple[Tensor, Tensor]:
    """Return gate and up: the two tensors of a split layout, else views of the one."""
    if second is not None:
        return first, second
    if form.layout == "packed":
        pair = first.chunk(2, dim=-1)
    else:
        pair = (first[..., ::2], first[..., 1::2])
    return (pair[0], pair[1]) if form.gate_first else (pair[1], pair[0])


def shape_of_output(gate: Tensor, up: Tensor | None) -> list[Any]:
    """Return the shape of the unit's value."""
    return [*gate.shape[:-1], gate.shape[-1] // 2] if up is None else list(gate.shape)


def dtype_of_output(gate: Tensor, up: Tensor | None) -> torch.dtype:
    """Return the dtype of the unit's value."""
    return gate.dtype if up is None else torch.promote_types(gate.dtype, up.dtype)


def new_output(gate: Tensor, up: Tensor | None, *attributes: Any) -> Tensor:
    """Return fresh memory for the unit's value."""
    return gate.new_empty(shape_of_output(gate, up), dtype=dtype_of_output(gate, up))


def new_gradients(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    *attributes: Any,
    memory: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor | None, Tensor | None]:
    """Return memory for the gradients that are needed; of one tensor that holds both, as the first.

    It is that of `memory`, fresh where that is None.
    """
    *_, need_gate, need_up = attributes
    needed = (gate if need_gate or up is None else None, up if need_up else None)
    dgate, dup = (
        None if like is None else like.new_empty(like.shape) if place is None else place
        for like, place in zip(needed, memory, strict=True)
    )
    return dgate, dup
