"""Launch a kernel under a driver that records launches: prints what ran, as JSON; needs Triton without interpreter."""

from __future__ import annotations

import json
import threading
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fxopt.kernels import launcher
from fxopt.kernels.launch import jit, tl

launched: list[list[Any]] = []


class Utilities:
    """What Triton asks of a driver when it loads a binary."""

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class RecordingDriver:
    """A driver for a GPU that is not there."""

    utils = Utilities()

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def record(*call: Any) -> None:
            *_, x, y, count, eps, block, name = call
            launched.append([*call[:3], x.data_ptr() % 16, y.data_ptr() % 16, count, eps, block, name])

        return record

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@jit
def copy_kernel(p_x, p_y, count, eps, BLOCK: tl.constexpr, NAME: tl.constexpr):
    b_at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + b_at, tl.load(p_x + b_at, mask=b_at < count) + eps, mask=b_at < count)


@jit(do_not_specialize=["count"])
def counted_kernel(p_x, p_y, count, eps, BLOCK: tl.constexpr, NAME: tl.constexpr):
    b_at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + b_at, tl.load(p_x + b_at, mask=b_at < count) + eps, mask=b_at < count)


def launch_copy(x: torch.Tensor, count: int, block: int = 16, kernel: Any = copy_kernel) -> None:
    launcher.launch(
        kernel, (3,), x, torch.empty_like(x), count, 0.5, NAME="a", BLOCK=block, num_warps=1,
        enable_fp_fusion=True,
    )  # fmt: skip


def num_variants(kernel: Any = copy_kernel) -> int:
    return len(launcher._variants.get(kernel, {}))  # pyright: ignore[reportPrivateUsage]


def num_pending() -> int:
    return len(launcher._pending)  # pyright: ignore[reportPrivateUsage]


def main() -> None:
    driver.set_active(RecordingDriver())
    x = torch.zeros(64)
    found: dict[str, Any] = {}
    launch_copy(x, 48)
    launch_copy(x, 32)
    found["once"] = [num_variants(), list(launched)]
    for count, values, block in ((47, x, 16), (1, x, 16), (48, x[1:], 16), (48, x.half(), 16), (48, x, 32)):
        launch_copy(values, count, block)
    found["variants"] = num_variants()
    for count in (48, 47, 1, 2**33):
        launch_copy(x, count, kernel=counted_kernel)
    found["counted"] = num_variants(counted_kernel)
    launched.clear()

    elsewhere = threading.Thread(target=launch_copy, args=(x, 48))
    with launcher.rehearsed():
        launch_copy(x, 48)
        launch_copy(x, 48, 64)
        launch_copy(x, 32, 64)
        elsewhere.start()
        elsewhere.join()
        found["while rehearsing"] = [launcher.is_rehearsal(), num_pending(), len(launched)]
    launcher.finish_compiling()
    found["finished"] = [future.done() for future in launcher._pending.values()]  # pyright: ignore[reportPrivateUsage]
    found["after"] = [launcher.is_rehearsal(), num_variants()]
    launch_copy(x, 48, 64)
    found["then"] = [num_pending(), num_variants(), len(launched)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
