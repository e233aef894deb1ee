"""What all kernel files share: is Triton usable here, launch sizes, the wide dtype, and how an op is registered.

A kernel runs where `can_launch(tensor)` is true; elsewhere the op computes its reference in plain torch, and
the reason is said once. Under `TRITON_INTERPRET=1`, read when Triton is imported, kernels run on CPU tensors;
the ops do not use them there, tests do.

Triton is optional, since it exists for few platforms: kernel files import `jit` and `tl` from here, and
without it a kernel is an object that cannot be launched.
"""

import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import register_flop_formula

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = False
if TYPE_CHECKING:
    import triton.language as tl

    def jit(function: Callable[..., Any] | None = None, *, do_not_specialize: Sequence[str] = ()) -> Any:
        """Return `function` as a Triton kernel, or as a part of one.

        Numbers that only bound a kernel, counts of rows say, are not specialized: a proof with few rows then runs
        the very variant that training runs, and another length compiles nothing.
        """
elif HAS_TRITON:
    import triton.language as tl
    from triton import jit, knobs

    INTERPRETED = bool(knobs.runtime.interpret)
else:
    tl = SimpleNamespace(constexpr=lambda value=None: value)

    def jit(function=None, **options):
        """Return `function`: nothing can launch it."""
        return function or (lambda decorated: decorated)


KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (7, 5)
OLDEST_BFLOAT16_CAPABILITY = (8, 0)
MOST_WARPS = 16
SHARED_SLACK_BYTES = 16 * 1024  # for reductions
INTERPRETED_PROGRAMS = 3  # few, so that each program of a persistent grid does several turns under test


@dataclasses.dataclass(frozen=True)
class InPlace:
    """A form of an op that writes to arguments of it, for where nobody reads these afterwards.

    `op` takes the same arguments, its schema says which it writes to. `results` names the argument in which it leaves a
    result, by that one's number; the others it returns, in order.
    """

    op: torch._ops.OpOverload
    results: dict[int, str] = dataclasses.field(default_factory=dict[int, str])


@dataclasses.dataclass(frozen=True)
class Declared:
    """What a plan has to know of an op beside its floating-point operations; functions take the op's arguments.

    `workspace`: the most bytes that it holds for itself while it runs. `moved`: the bytes that it moves through memory
    beside its large products, which wait for that. `share`: what its products reach of the datasheet's, as measured on
    an H100 on single calls; None: what large matrix products reach. `rows`: the arguments whose rows (all dimensions
    but the last) it never mixes: called with some rows of these, it returns these rows of each result, or what they
    add to one that is a sum over rows. `launches`: the kernels that one call runs; None: one. `output`: takes the
    number of a result as well, and returns the arguments of `<op>_output`, which computes it alone, or None. `labels`:
    the arguments of whole numbers that name classes, so that none of them changes how much work there is. `in_place`:
    its forms that write to arguments, the ones that need least memory first. `known`: the op that copies rows of its
    result for an argument of this name: given the first ones, it computes the others alone.
    """

    workspace: Callable[..., int] | None = None
    moved: Callable[..., int] | None = None
    share: float | None = None
    rows: tuple[str, ...] = ()
    launches: Callable[..., int] | None = None
    output: Callable[..., tuple[Any, ...] | None] | None = None
    labels: tuple[str, ...] = ()
    in_place: tuple[InPlace, ...] = ()
    known: torch._ops.OpOverload | None = None


DECLARED: dict[torch._ops.OpOverload, Declared] = {}
"""What each op declares to plans."""
LIBRARY = torch.library.Library("fxopt", "FRAGMENT")


@functools.cache
def find_obstacle(device_index: int, dtype: torch.dtype) -> str | None:
    """Return why no kernel can run on that CUDA device for `dtype`, or None."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if INTERPRETED:
        return "TRITON_INTERPRET is set, and interpreted kernels are for tests on a CPU"
    if torch.version.hip is not None:
        return "the kernels are built and tested for NVIDIA devices only"
    capability = torch.cuda.get_device_capability(device_index)
    name = torch.cuda.get_device_name(device_index)
    if capability < OLDEST_CAPABILITY:
        return f"{name} has compute capability {capability}, expected {OLDEST_CAPABILITY} or newer"
    if dtype == torch.bfloat16 and capability < OLDEST_BFLOAT16_CAPABILITY:
        return f"{name} has no bfloat16 instructions; float16 works on it"
    return None


@functools.cache
def is_available() -> bool:
    """Return whether kernels can run on the current CUDA device."""
    if not torch.cuda.is_available():
        return False
    return find_obstacle(torch.cuda.current_device(), torch.float16) is None


@functools.cache
def _can_launch(device_index: int, dtype: torch.dtype) -> bool:
    if dtype not in KERNEL_DTYPES:
        return False  # float64 is what references are for: no warning
    obstacle = find_obstacle(device_index, dtype)
    if obstacle is not None:
        warn_once(f"fxopt kernels: not used, plain torch runs instead: {obstacle}")
    return obstacle is None


@functools.cache
def warn_once(text: str) -> None:
    """Warn with `text`, the first time only."""
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def can_launch(*tensors: torch.Tensor | None, out_dtype: torch.dtype | None = None) -> bool:
    """Return whether a kernel can read these CUDA tensors and write `out_dtype`; the first "no" for a device warns."""
    for tensor in tensors:
        if tensor is not None:
            index = tensor.device.index
            if not _can_launch(index, tensor.dtype) or not (
                out_dtype is None or _can_launch(index, out_dtype)
            ):
                return False
    return True


@functools.cache
def num_processors(device: torch.device) -> int:
    """Return the number of multiprocessors of `device`; a small number in the interpreter."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Return a context in which Triton launches on the device of `tensor`."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def ceil_div(numerator: int, denominator: int) -> int:
    """Return the quotient rounded up.

    >>> ceil_div(9, 4)
    3
    """
    return -(-numerator // denominator)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which an op on `dtype` computes: float32, or float64 for float64.

    >>> wide_dtype(torch.bfloat16), wide_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def next_power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below `number`.

    >>> next_power_of_two(896), next_power_of_two(1024)
    (1024, 1024)
    """
    return 1 << max(number - 1, 0).bit_length()


def num_warps_for(tile_elements: int, elements_per_thread: int = 16, at_most: int = MOST_WARPS) -> int:
    """Return a power of two of warps that gives each thread about `elements_per_thread` of a tile.

    >>> num_warps_for(4096), num_warps_for(128), num_warps_for(65536)
    (8, 1, 16)
    """
    return max(1, min(at_most, next_power_of_two(tile_elements // (32 * elements_per_thread))))


@functools.cache
def num_stages_for(loop_bytes: int, device: torch.device, stages: int = 3) -> int:
    """Return the stages of a loop whose turns load `loop_bytes`: `stages`, 3 if these do not fit, 1 if neither does.

    Of n stages n - 1 have a buffer. With 2 stages the single one is filled after a turn's arithmetic: nothing overlaps.
    """
    if device.type != "cuda":
        return 1
    most = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return next((n for n in (stages, 3) if (n - 1) * loop_bytes + SHARED_SLACK_BYTES <= most), 1)


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` as [rows, last dimension] with a last stride of 1: a view where strides allow it, else a copy.

    >>> as_rows(torch.empty(2, 3, 8)[..., :4]).shape
    torch.Size([6, 4])
    """
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() != 2 else tensor
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def with_row_stride(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return a tensor whose memory holds the rows of `tensor`, last stride 1, and the distance between rows.

    A dense tensor is returned as it is: a view costs the host more than the rest of a launch's arithmetic.

    >>> tensor, row_stride = with_row_stride(torch.empty(2, 3, 8)[..., :4])
    >>> tensor.shape, row_stride
    (torch.Size([6, 4]), 8)
    """
    if tensor.is_contiguous():
        return tensor, tensor.shape[-1]
    rows = as_rows(tensor)
    return rows, rows.stride(0)


def register_op(
    schema: str,
    *,
    plain: Callable[..., Any],
    fused: Callable[..., Any],
    fake: Callable[..., Any],
    tags: tuple[torch.Tag, ...] = (),
    flops: Callable[..., int] | None = None,
    declared: Declared | None = None,
) -> Any:
    """Define `fxopt::<schema>`, run by `plain` on a CPU, `fused` on CUDA, `fake` under FakeTensor; return the op.

    An op tagged `torch.Tag.pointwise` is computed again in the backward pass instead of saved. An op named
    `<op>_output_<n>` computes output n of `<op>` alone from arguments of that op, found by name, and from
    `output_<m>`, its output m: what a backward op of ours reads by an argument `xs` is computed so in backward.
    `<op>_backward_output` is `<op>_backward` (its first argument the gradient, then the arguments of `<op>`) that also
    returns the value of `<op>`, last: for what needs that value no sooner than its gradient.
    `flops` returns, from the op's arguments, its floating-point operations: torch's own counter knows them then.
    `declared` is what plans have to know besides.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    LIBRARY.impl(name, plain, "CPU")
    LIBRARY.impl(name, fused, "CUDA")
    torch.library.register_fake(f"fxopt::{name}", fake, lib=LIBRARY)
    packet = getattr(torch.ops.fxopt, name)
    if flops is not None:
        count = flops
        register_flop_formula(packet, get_raw=True)(
            lambda *args, out_val=None, **kwargs: count(*args, **kwargs)
        )
    if declared is not None:
        DECLARED[packet.default] = declared
    return packet.default


class _Refused(torch.autograd.Function):
    """Passes gradients on, and raises where they are differentiated."""

    @staticmethod
    def forward(ctx: Any, message: str, *values: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return `values`."""
        ctx.message = message
        return values

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """Raise."""
        raise RuntimeError(ctx.message)


def register_gradient(
    name: str,
    forward_op: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Return `fxopt::<name>` made differentiable by `backward`; differentiating the gradients is an error.

    A `torch.autograd.Function` around the op, and no gradient registered with the op itself: a compiled graph
    calls forward and backward op, both without gradients, and a registered one costs it Python at each call.
    """
    message = (
        f"fxopt::{name}: second derivatives are not implemented, expected one backward pass, got a backward "
        f"through fxopt::{name}_backward\nLeave this op out of the rewrite, or run the stock model here"
    )

    def differentiate(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        return _Refused.apply(
            message, *(None if value is None else value.detach().requires_grad_() for value in found)
        )

    functions = {
        "forward": staticmethod(forward_op),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(differentiate),
    }
    return type(f"fxopt_{name}", (torch.autograd.Function,), functions).apply
