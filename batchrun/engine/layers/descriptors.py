"""What a GPU copies by itself, block by block, which spares its threads the addresses.

That is the tensor memory accelerator of a Hopper GPU. A kernel gets a `TensorDescriptor` in place of a pointer then.
Triton's interpreter, on a CPU, has them, too.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def is_describable(numbers: Tensor) -> bool:
    """Whether blocks of them can be described: a row's side by side, and each row where 16 bytes begin."""
    if numbers.is_cuda and not _has_tensor_memory_accelerator(numbers.device):
        return False
    apart = (stride * numbers.itemsize % 16 for stride in numbers.stride()[:-1])
    return numbers.stride(-1) == 1 and not any(apart) and numbers.data_ptr() % 16 == 0


@functools.cache
def _has_tensor_memory_accelerator(device: torch.device) -> bool:
    # Blackwell has one too, where none of these kernels has run yet.
    return torch.cuda.get_device_capability(device)[0] == 9
