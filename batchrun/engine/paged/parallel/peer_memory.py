"""Memory of each rank's GPU that the other ranks' GPUs read and write, over NVLink."""

from __future__ import annotations

import ctypes
import os

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch._C._autograd import DeviceType
from torch._C._distributed_c10d import _SymmetricMemory

from batchrun.engine.paged.device.group import Group
from batchrun.engine.paged.parallel.peer_sum import MAX_RANKS, MEMORY_BYTES, PeerSum

_NATIVE_ATOMICS = 3
"""CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED: with it flags can be set in each other's memory."""


def connect(group: Group) -> PeerSum | None:
    """Called by all ranks of a group that has come together; None on each of them where one cannot reach another."""
    # Multicast needs more of a driver and a container than can be relied on, and nothing here uses it.
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    unwanted = _SymmetricMemory.has_multicast_support(DeviceType.CUDA, group.rank)
    if not group.least(not unwanted and _reaches_all(group)):
        return None
    memory = handle = None
    addresses = []
    try:
        memory = symmetric_memory.empty(MEMORY_BYTES, dtype=torch.uint8, device=group.device)
        handle = symmetric_memory.rendezvous(memory, dist.distributed_c10d._get_default_group())
        addresses = [
            handle.get_buffer(rank, (MEMORY_BYTES,), torch.uint8).data_ptr() for rank in range(group.size)
        ]
        memory.zero_()
    except RuntimeError:
        # Whatever a driver or a container lacks for it: NCCL finds another way.
        addresses = []
    if not group.least(bool(addresses)):
        return None
    return PeerSum(group.rank, addresses, group.device, (memory, handle))


def _reaches_all(group: Group) -> bool:
    return group.size <= MAX_RANKS and all(
        _sets_flags(group.rank, other) for other in range(group.size) if other != group.rank
    )


def _sets_flags(device: int, other: int) -> bool:
    """Whether one GPU reads the other's memory, and changes numbers there in one step."""
    if not torch.cuda.can_device_access_peer(device, other):
        return False
    value = ctypes.c_int(0)
    cuda = ctypes.CDLL("libcuda.so.1")
    status: int = cuda.cuDeviceGetP2PAttribute(ctypes.byref(value), _NATIVE_ATOMICS, device, other)
    return status == 0 and value.value == 1
