"""What a GPU can do, from its datasheet: what costs are estimated from where nothing was measured."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """Datasheet figures of one device: memory, bandwidth and dense products per second.

    `half_flops` is for products of bfloat16 or float16 accumulated in float32, `single_flops` for float32; `link` is
    the bus to the host, in bytes a second each way.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    half_flops: float
    single_flops: float
    link: float
    launch_ps: int = 3_000_000
    """What each kernel takes besides its work."""
    bounded: bool = True
    """Whether `memory_bytes` is a limit of its own: a CPU shares its memory with everything else."""
    is_hopper: bool = False
    """Whether it is of compute capability 9.0."""


GEMM_SHARE = 0.75
BANDWIDTH_SHARE = 0.9
LINK_SHARE = 0.86
"""What is reached of a datasheet's figures: 700 to 790 of 989 TFLOP/s, 3.02 of 3.35 TB/s and 55 of 64 GB/s to the host
on an H100, measured on single products and copies."""

DEVICES = (
    Device("H100", 80 * GIB, 3.35e12, 989e12, 67e12, 64e9, is_hopper=True),
    Device("H200", int(139.7 * GIB), 4.8e12, 989e12, 67e12, 64e9, is_hopper=True),
    Device("A100", 80 * GIB, 2.039e12, 312e12, 19.5e12, 32e9),
    Device("4090", 24 * GIB, 1.008e12, 165e12, 82.6e12, 32e9),
    Device("L4", 24 * GIB, 0.3e12, 121e12, 30.3e12, 32e9),
)
"""H100 SXM of 80 GB, H200 SXM of 141 GB, A100 SXM of 80 GB, GeForce RTX 4090 and L4."""
OTHER = Device("CPU", 16 * GIB, 0.1e12, 1e12, 1e12, 16e9, launch_ps=0, bounded=False)
"""A CPU, or a GPU that is in no table: only the ratio of products to bandwidth matters for a plan."""


def find_device(name: str) -> Device | None:
    """Return the device of the table whose name occurs in `name`, or None.

    >>> find_device("NVIDIA H100 80GB HBM3").name, find_device("TPU")
    ('H100', None)
    """
    words = name.replace("-", " ").split()
    return next((device for device in DEVICES if device.name in words), None)


def device_of(device: torch.device) -> Device:
    """Return the figures of `device`, its own memory among them."""
    if device.type != "cuda":
        return OTHER
    properties = cast("Any", torch.cuda).get_device_properties(device)
    known = find_device(properties.name) or dataclasses.replace(
        OTHER, launch_ps=DEVICES[0].launch_ps, bounded=True
    )
    return dataclasses.replace(known, name=properties.name, memory_bytes=properties.total_memory)
