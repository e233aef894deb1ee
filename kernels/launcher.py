"""How a kernel is launched: a variant compiled for arguments like these is kept, and may be compiled ahead.

`launch` looks a variant up by what Triton specializes on (dtypes, 16-byte alignment, integers that are 1 or multiples
of 16, constants) and calls it as Triton's own tutorials call a kernel that was compiled ahead:
`compiled[grid](*arguments, *constants)`. Variants live as long as the process, as Triton's own do; they hold no tensor.

Within `compiled_ahead()` nothing is launched: variants that are missing are compiled side by side, while the caller
goes on. Triton alone compiles one kernel at a time in 0.5 to 2 s, most of it in LLVM, ptxas and a C compiler.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import torch

from fxopt.kernels.launch import HAS_TRITON, INTERPRETED

MOST_COMPILERS = 8
MOST_INT32 = 2**31
KEPT_INTEGERS = 2**16
ALIGNMENT = 16

Form = tuple[Any, ...]


class Variant(NamedTuple):
    """A compiled kernel and the constants that follow its arguments."""

    compiled: Any
    constants: tuple[Any, ...]


_variants: dict[Any, dict[Form, Variant]] = {}
_pending: dict[tuple[Any, Form], Future[Variant]] = {}
_rehearsing: set[int] = set()
"""Threads whose launches only compile: what others train meanwhile is launched."""
_reading = threading.Lock()
_call: Any = operator.call


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int,
    enable_fp_fusion: bool,
    num_stages: int | None = None,
    **constants: Any,
) -> None:
    """Run `kernel` on the current device and stream; `arguments` come first in its signature, a tensor the first.

    Constants come by name, of each kernel always the same names in the same order.
    """
    if INTERPRETED:
        kernel[grid](*arguments, **_options(num_warps, enable_fp_fusion, num_stages), **constants)
        return
    device = arguments[0].device.index
    options = num_warps, enable_fp_fusion, num_stages
    form = (device, *options, *constants.values(), *map(_call, _readers_of(kernel), arguments))
    variants = _variants.setdefault(kernel, {})
    variant = variants.get(form)
    if _rehearsing and is_rehearsal():
        if variant is None and (kernel, form) not in _pending:
            _pending[kernel, form] = _compile_aside(kernel, arguments, options, constants)
        return
    if variant is None:
        future = _pending.pop((kernel, form), None) if _pending else None
        variant = future.result() if future else _compile(kernel, arguments, options, constants)
        variants[form] = variant
    compiled, kept = variant
    compiled[(*grid, 1, 1)[:3]](*arguments, *kept)


def form_of(argument: Any) -> Any:
    """Return what a variant depends on of one argument.

    >>> form_of(1), form_of(48), form_of(50), form_of(2**40 + 1)
    (1, (True, True), (False, True), (False, False))
    >>> form_of(torch.empty(8)), form_of(0.5), form_of(None)
    (torch.float32, <class 'float'>, <class 'NoneType'>)
    """
    if isinstance(argument, torch.Tensor):
        return argument.dtype if argument.data_ptr() % ALIGNMENT == 0 else (argument.dtype,)
    if argument.__class__ is int:
        return _form_of_integer(argument)
    return argument if argument.__class__ is bool else argument.__class__


@functools.lru_cache(KEPT_INTEGERS)
def _form_of_integer(number: int) -> Any:
    return 1 if number == 1 else (number % ALIGNMENT == 0, fits_int32(number))


def fits_int32(number: int) -> bool:
    """Return the form of a number that a kernel is not specialized on.

    >>> fits_int32(1), fits_int32(2**40)
    (True, False)
    """
    return -MOST_INT32 <= number < MOST_INT32


@functools.cache
def _readers_of(kernel: Any) -> tuple[Callable[[Any], Any], ...]:
    """Return what reads the form of each argument of `kernel`."""
    return tuple(fits_int32 if parameter.do_not_specialize else form_of for parameter in kernel.params)


def is_rehearsal() -> bool:
    """Return whether launches of this thread only compile: what they would have written is not there."""
    return threading.get_ident() in _rehearsing


@contextlib.contextmanager
def compiled_ahead(device: torch.device) -> Generator[bool]:
    """Compile, side by side, what the body would launch on `device`; yields whether there is anything to gain.

    Ops in the body return memory that nothing has written; what others index by must be zero then. An error is left to
    the launch that meets it.
    """
    if device.type != "cuda" or not HAS_TRITON or INTERPRETED:
        yield False
        return
    with rehearsed(), torch.autograd.set_multithreading_enabled(False):
        # else backward would run in a thread of the device, which other models share
        yield True


@contextlib.contextmanager
def rehearsed() -> Generator[None]:
    """Let launches of this thread only start compiling what they miss; a launch that needs it waits for it."""
    thread = threading.get_ident()
    _rehearsing.add(thread)
    try:
        yield
    finally:
        _rehearsing.discard(thread)


def finish_compiling() -> None:
    """Wait until no variant is being compiled ahead; errors are left to the launches that meet them."""
    wait(list(_pending.values()))


class _Backward(torch.autograd.Function):
    """A node whose backward pass is a function of the caller's."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, run: Callable[[], None]) -> torch.Tensor:
        ctx.run = run
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.run()
        return None, None


def run_as_backward(run: Callable[[], None], device: torch.device) -> None:
    """Call `run` in the thread in which autograd runs the backward passes of `device`."""
    with torch.enable_grad():
        anchor = torch.zeros((), device=device, requires_grad=True)
        torch.autograd.grad(_Backward.apply(anchor, run), anchor, allow_unused=True)


@functools.cache
def _compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MOST_COMPILERS, os.cpu_count() or 1), "fxopt-compile")


def _compile_aside(
    kernel: Any,
    arguments: tuple[Any, ...],
    options: tuple[int, bool, int | None],
    constants: dict[str, Any],
) -> Future[Variant]:
    device = arguments[0].device
    arguments = tuple(map(_only_form, arguments))

    def compile_there() -> Variant:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return _compile(kernel, arguments, options, constants)

    return _compilers().submit(compile_there)


def _only_form(argument: Any) -> Any:
    """Return a tensor of one or two items of the form of `argument`: waiting to be compiled, it holds no memory.

    >>> form_of(_only_form(torch.empty(1000)[1:])) == form_of(torch.empty(1000)[1:])
    True
    """
    if not isinstance(argument, torch.Tensor):
        return argument
    is_aligned = argument.data_ptr() % ALIGNMENT == 0
    return argument.new_empty(2)[0 if is_aligned else 1 :]


def _compile(
    kernel: Any,
    arguments: tuple[Any, ...],
    options: tuple[int, bool, int | None],
    constants: dict[str, Any],
) -> Variant:
    read_triton()
    compiled = kernel.warmup(*arguments, grid=(1,), **_options(*options), **constants)
    _ = compiled[1, 1, 1]  # loads the binary and builds its launcher
    names = kernel.arg_names[len(arguments) :]
    return Variant(compiled, tuple(constants[name] for name in names))


def read_triton() -> None:
    """Have Triton read itself once for the names of its cache: 1 s, which threads side by side would take each."""
    from triton.runtime.cache import triton_key

    with _reading:
        triton_key()


def _options(num_warps: int, enable_fp_fusion: bool, num_stages: int | None) -> dict[str, Any]:
    options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
    return options if num_stages is None else options | {"num_stages": num_stages}
