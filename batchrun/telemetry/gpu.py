"""Which GPUs this process may use, and how busy and how full its own is, by NVML; nothing where there is none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from itertools import takewhile
from typing import Any

import pynvml

# What CUDA_VISIBLE_DEVICES may hold beside indices: GPUs, and slices of them.
UUIDS = ("GPU-", "MIG-")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU at one moment. `use` is the share of NVML's last sampling period in which a kernel ran, None where
    it cannot say (MIG); memory is in bytes, of all processes on it."""

    name: str
    use: float | None
    memory_used: int
    memory_total: int


def gpu_now() -> Gpu | None:
    """The first GPU that CUDA shows this process. Well under a millisecond; takes no memory on the GPU."""
    handle = _handle(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if handle is None:
        return None
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name = pynvml.nvmlDeviceGetName(handle)
    except pynvml.NVMLError:  # it fell off the bus: no number is better than an old one
        return None
    return Gpu(name, _use(handle), int(memory.used), int(memory.total))


def _use(handle: Any) -> float | None:
    try:
        return float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except pynvml.NVMLError:
        return None


@cache
def _handle(visible: str | None) -> Any:
    """NVML's handle of the first device in CUDA_VISIBLE_DEVICES: an index or a UUID; None without such a GPU."""
    first = "0" if visible is None else visible.split(",")[0].strip()
    if not first or first == "-1":
        return None
    try:
        pynvml.nvmlInit()
        if first.isdigit():
            return pynvml.nvmlDeviceGetHandleByIndex(int(first))
        return pynvml.nvmlDeviceGetHandleByUUID(first)
    except pynvml.NVMLError:
        return None


def local_workers(wanted: int | None, gpus: Sequence[str]) -> int:
    """How many workers this machine gets: as many as are asked for, else one for each GPU, or one without any."""
    return wanted or max(1, len(gpus))


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as values for CUDA_VISIBLE_DEVICES; empty on a machine without one."""
    if "+cpu" in metadata.version("torch"):
        return []
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(i) for i in range(count)]
    # CUDA heeds the names up to the first one that is no GPU.
    names = (name.strip() for name in named.split(","))
    return list(
        takewhile(lambda name: int(name) < count if name.isdigit() else name.startswith(UUIDS), names)
    )


def environment_of_gpu(gpus: list[str], worker: int) -> dict[str, str]:
    """What the processes of this worker get to see of the visible GPUs, if there are any: its own."""
    return {"CUDA_VISIBLE_DEVICES": gpus[worker]} if gpus else {}
