"""The ranks of an engine as one group of processes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from batchrun.engine.paged.device.progress import Progress
from batchrun.engine.protocol import EngineSpec

_JOIN_SECONDS = 1800.0
"""Until the last rank has loaded: from cold disks that takes as long as it takes."""


@dataclass(frozen=True, slots=True)
class Group:
    """One rank's view of all, made by the thread that computes. `store` is a file through which they find each other,
    see `place_to_meet`; `progress` is this rank's."""

    rank: int
    size: int
    store: str
    device: torch.device
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "progress", Progress(self.device))

    def join(self) -> None:
        """Waits until all ranks are there. Once a process; before any other method."""
        gpu = self.device.type == "cuda"
        # torch exports it, but not to type checkers.
        file_store: Any = dist.FileStore  # type: ignore[attr-defined]
        # Multicast over NVLink (NVLS) needs more of a driver and a container than can be relied on.
        os.environ["NCCL_NVLS_ENABLE"] = "0"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=file_store(self.store, self.size),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=_JOIN_SECONDS),
            device_id=self.device if gpu else None,
        )

    def leave(self) -> None:
        """Nothing is done together from now on. On GPUs only the process's end undoes it: NCCL would wait for the
        others, and for graphs that hold its communicator."""
        if self.device.type == "cpu" and dist.is_initialized():
            dist.destroy_process_group()

    def least(self, number: int) -> int:
        """The least that any rank has; waits for the device."""
        value = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
        return int(value)


def device_of(spec: EngineSpec, rank: int) -> torch.device:
    """The rank's device, with its number where it is a GPU."""
    return torch.device("cuda", rank) if spec.device.startswith("cuda") else torch.device(spec.device)


def place_to_meet() -> tuple[int, str]:
    """A file for `Group.store` in memory alone, so that nothing stays behind: its descriptor, which other ranks have to
    inherit, and its name to them all."""
    descriptor = os.memfd_create("batchrun-ranks")
    return descriptor, f"/proc/self/fd/{descriptor}"
