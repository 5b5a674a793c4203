"""Which GPUs this process may use, in what groups, and how busy and how full they are, by NVML."""

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
    """An engine's GPUs, `count` of them, at one moment. `use` is the mean share of NVML's last sampling period in which
    a kernel ran, None where it cannot say (MIG); memory is in bytes, of all processes on all of them. `name` is the
    first one's."""

    name: str
    use: float | None
    memory_used: int
    memory_total: int
    count: int = 1


def gpu_now(count: int = 1) -> Gpu | None:
    """The first `count` GPUs that CUDA shows this process, as far as there are so many. Well under a millisecond for
    each; takes no memory on them."""
    handles = (_handle(os.environ.get("CUDA_VISIBLE_DEVICES"), place) for place in range(count))
    found = [one for handle in handles if handle is not None and (one := _look(handle)) is not None]
    if not found:
        return None
    uses = [one.use for one in found if one.use is not None]
    return Gpu(
        found[0].name,
        sum(uses) / len(uses) if uses else None,
        sum(one.memory_used for one in found),
        sum(one.memory_total for one in found),
        len(found),
    )


def _look(handle: Any) -> Gpu | None:
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name = pynvml.nvmlDeviceGetName(handle)
    except pynvml.NVMLError:
        # It fell off the bus: no number is better than an old one.
        return None
    return Gpu(name, _use(handle), int(memory.used), int(memory.total))


def _use(handle: Any) -> float | None:
    try:
        return float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except pynvml.NVMLError:
        return None


@cache
def _handle(visible: str | None, place: int = 0) -> Any:
    """NVML's handle of the device in that place of CUDA_VISIBLE_DEVICES: an index or a UUID; None without such a
    GPU."""
    names = [str(place)] * (place + 1) if visible is None else [name.strip() for name in visible.split(",")]
    # CUDA heeds the names up to the first one that is no GPU.
    if place >= len(names) or any(name in ("", "-1") for name in names[: place + 1]):
        return None
    name = names[place]
    try:
        pynvml.nvmlInit()
        if name.isdigit():
            return pynvml.nvmlDeviceGetHandleByIndex(int(name))
        return pynvml.nvmlDeviceGetHandleByUUID(name)
    except pynvml.NVMLError:
        return None


def local_workers(wanted: int | None, gpus: Sequence[str], each: int = 1) -> int:
    """How many workers this machine gets: as many as are asked for, else one for `each` so many GPUs, or one."""
    return wanted or max(1, len(gpus) // each)


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as values for CUDA_VISIBLE_DEVICES; empty on a machine without one."""
    return [] if "+cpu" in metadata.version("torch") else named_gpus()


def named_gpus() -> list[str]:
    """The same, whether or not this torch can use them."""
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


def environment_of_gpus(gpus: Sequence[str], worker: int, each: int = 1) -> dict[str, str]:
    """What the processes of this worker get to see of the visible GPUs, if there are any: `each` so many of its own."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[worker * each : (worker + 1) * each])} if gpus else {}
