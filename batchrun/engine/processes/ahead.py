"""What an engine's process does for an engine that it has not been asked for yet, beside its imports."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path


def prepare(model_path: str) -> None:
    """Makes ready what takes long and needs no Python: the GPU's context, and the weights in the page cache."""
    _read_ahead(Path(model_path))
    _open_gpu()


def _open_gpu() -> None:
    """Creates the context on the first visible GPU that torch will then find: half a second and more, in which
    ctypes lets the imports go on. What is wrong with a driver or a GPU is torch's to tell."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def _read_ahead(folder: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        with suppress(OSError), file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
