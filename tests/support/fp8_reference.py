"""transformers' own attention, to whose keys and values a conversion to fp8 and back is added: "fp8_reference"."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from batchrun.engine.layers.fp8 import quantize_rows


def _in_fp8(x: torch.Tensor) -> torch.Tensor:
    rows, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    return (rows.float() * scale).view_as(x)


def _attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **needs: Any) -> Any:
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, _in_fp8(key), _in_fp8(value), mask, **needs)


AttentionInterface.register("fp8_reference", _attention)
AttentionMaskInterface.register("fp8_reference", eager_mask)
