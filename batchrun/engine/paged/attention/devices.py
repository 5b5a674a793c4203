"""Whether a tensor's device is a GPU. Asked through this module, so that tests run on a CPU what only a GPU would."""

from __future__ import annotations

import torch


def is_gpu(device: torch.device) -> bool:
    """Whether work on it goes to a GPU."""
    return device.type == "cuda"
