"""Triton's interpreter converts to fp8 without carrying a rounded mantissa into the exponent, and knows no NaN: torch's
conversions in its place, which are those of a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_others = interpreter._convert_float
_FLOATS = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}
_TYPES = _FLOATS | {tl.float8e4nv: torch.float8_e4m3fn}


def _convert(x: Any, have: Any, want: Any, rounding_mode: Any) -> Any:
    if tl.float8e4nv not in (have, want) or not {have, want} <= _TYPES.keys():
        return _others(x, have, want, rounding_mode)
    bits = torch.from_numpy(np.frombuffer(x.tobytes(), np.uint8).copy())
    converted = bits.view(_TYPES[have]).to(_TYPES[want]).view(torch.uint8).numpy()
    return np.frombuffer(converted.tobytes(), f"uint{want.primitive_bitwidth}").reshape(x.shape)


def use() -> None:
    """From now on, in this process; nothing changes on a GPU."""
    interpreter._convert_float = _convert
