"""What attention's kernels have in common: a block of keys into a running softmax, and the blocks' sizes.

As in FlashAttention-2 (Dao, 2023).
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchrun.engine.paged.attention import fp8_pages

LOG2_E = 1.4426950408889634


@triton.jit
def softcapped(qk, scale, softcap):
    """A tanh of what the GPU has an instruction for, in powers of two."""
    bent = 2.0 / (1.0 + tl.exp2(-2.0 * 1.4426950408889634 * scale * qk / softcap)) - 1.0
    return softcap * 1.4426950408889634 * bent


@triton.jit
def _larger(a, b, other_a, other_b):
    return tl.maximum(a, other_a), tl.maximum(b, other_b)


@triton.jit
def attend(
    q, k, v, k_scale, v_scale, mask, m_i, l_i, acc, scale, softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """One block of keys into a running softmax (Milakov and Gimelshein, 2018), in powers of two.

    Keys and values in fp8 have a scale each, which goes to the scores and to the probabilities. `q` and `scale` are
    then as `fp8_pages.normalized` gives them; products are in q's format, summed in float32. Where `v` are pairs, see
    `fp8_pages.widened_pairs`, `acc` has the even columns and the odd ones.
    """
    if k_scale is not None:
        qk = tl.dot(q, k.to(q.dtype)) * (scale[:, None] * k_scale[None, :])
        scale = 1.0
    else:
        qk = tl.dot(q, k)
    if SOFTCAP:
        qk, scale = softcapped(qk, scale, softcap), 1.0
    if MASKED:
        qk = tl.where(mask, qk, float("-inf"))
    if v_scale is not None:
        # One reduction for both, since warps wait for each other in it.
        largest, unit = tl.reduce((qk, tl.broadcast_to(v_scale[None, :], qk.shape)), 1, _larger)
        # Of all that float16 can hold, probabilities get the most: from 1024 down.
        unit = tl.maximum(unit, 1e-30)[:, None] / 1024
    else:
        largest = tl.max(qk, axis=1)
    m_new = tl.maximum(m_i, largest * scale)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m_i - m_safe)
    p = tl.exp2(qk * scale - m_safe[:, None])  # one instruction for both, since the scale comes last
    if v_scale is not None:
        scaled = (p * (v_scale[None, :] * (1.0 / unit))).to(q.dtype)
        if v.dtype == tl.int16:
            even, odd = fp8_pages.widened_pairs(v, q.dtype)
            acc = (
                acc[0] * alpha[:, None] + tl.dot(scaled, even) * unit,
                acc[1] * alpha[:, None] + tl.dot(scaled, odd) * unit,
            )
        else:
            acc = acc * alpha[:, None] + tl.dot(scaled, v.to(q.dtype)) * unit
    else:
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return m_new, l_i * alpha + tl.sum(p, axis=1), acc


def shared_memory(x: Tensor) -> int:
    """Bytes that a block of threads may have."""
    if not x.is_cuda:  # Triton's interpreter
        return 0
    device: Any = torch.cuda.get_device_properties(x.device)
    return int(getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block))


def fitting_blocks(
    choices: tuple[tuple[int, int], ...], block_m: int, head_bytes: int, memory: int
) -> tuple[int, int]:
    """The first choice that leaves a quarter of the shared memory free, or the last one. Sizes in bytes."""
    for block_n, num_stages in choices:
        if (block_m + 2 * block_n * num_stages) * head_bytes <= 0.75 * memory:
            return block_n, num_stages
    return choices[-1]
