"""Products of a few rows with fp8 weights, in Triton: bound by reading the weights, which torch's own are slow at."""

# mypy: disable-error-code="no-untyped-def, attr-defined, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N, BLOCK_K = 64, 256
"""Columns and features in a block: of several tried on an H100, the best for most of Llama-8B's products."""

MULTIPROCESSORS, MIN_STEPS = 132, 12
"""Of an H100; and blocks of features for which it pays to be a split of its own."""

_counters: dict[torch.device, Tensor] = {}


@triton.jit(do_not_specialize=["rows", "splits"])
def _few_rows(
    x, x_scale, weight, weight_scale, out, parts, counters, rows, columns, features, splits, split_features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    NUM_STAGES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # The weight's rows take the place of the product's rows, of which matrix units want 64, and the few rows of x that
    # of its columns.
    block, split = tl.program_id(0), tl.program_id(1)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    mask_n, mask_m = offs_n < columns, offs_m < rows
    begin = split * split_features
    end = tl.minimum(begin + split_features, features)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    weight_rows = weight + offs_n.to(tl.int64)[:, None] * features
    x_rows = x + offs_m[:, None] * features
    for start in tl.range(begin, end, BLOCK_K, num_stages=NUM_STAGES):
        offs_k = start + tl.arange(0, BLOCK_K)
        if EVEN:
            w = tl.load(weight_rows + offs_k[None, :])
            a = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None], other=0.0)
        else:
            mask_k = (offs_k < end)[None, :]
            w = tl.load(weight_rows + offs_k[None, :], mask=mask_n[:, None] & mask_k, other=0.0)
            a = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k, other=0.0)
        acc = tl.dot(w, tl.trans(a), acc)
    mask = mask_m[None, :] & mask_n[:, None]
    if SPLIT:
        # The last block of those that share columns adds up what all of them have, always in the same order.
        place = offs_m.to(tl.int64)[None, :] * columns + offs_n[:, None]
        plane = rows.to(tl.int64) * columns
        tl.store(parts + split * plane + place, acc, mask=mask)
        tl.debug_barrier()
        if tl.atomic_add(counters + block, 1, sem="acq_rel") < splits - 1:
            return
        tl.store(counters + block, 0)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for number in range(0, splits):
            acc += tl.load(parts + number * plane + place, mask=mask, other=0.0, cache_modifier=".cg")
    scale_n = tl.load(weight_scale + offs_n, mask=mask_n, other=0.0)
    scale_m = tl.load(x_scale + offs_m, mask=mask_m, other=0.0)
    acc = acc * scale_n[:, None] * scale_m[None, :]
    tl.store(
        out + offs_m.to(tl.int64)[None, :] * columns + offs_n[:, None],
        acc.to(out.dtype.element_ty),
        mask=mask,
    )


def few_rows_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, splits: int | None = None
) -> Tensor:
    """x (rows, features) fp8 times the transposed weight (columns, features) fp8, bf16 (rows, columns).

    Args:
        x_scale: (rows, 1) float32. weight_scale: (columns, 1) float32.
        splits: blocks that share a column's features; by default what fills the GPU.
    """
    rows, features = x.shape
    columns = len(weight)
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=x.device)
    blocks, steps = triton.cdiv(columns, BLOCK_N), triton.cdiv(features, BLOCK_K)
    if splits is None:
        splits = max(1, min(MULTIPROCESSORS // blocks, steps // MIN_STEPS))
    split_features = triton.cdiv(steps, splits) * BLOCK_K
    splits = triton.cdiv(features, split_features)
    parts = torch.empty((splits, rows, columns), dtype=torch.float32, device=x.device) if splits > 1 else out
    _few_rows[(blocks, splits)](
        x, x_scale, weight, weight_scale, out, parts, _counters_on(x.device, blocks), rows, columns, features,
        splits, split_features,
        BLOCK_M=max(16, triton.next_power_of_2(rows)), BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, SPLIT=splits > 1,
        NUM_STAGES=4, EVEN=features % BLOCK_K == 0 and columns % BLOCK_N == 0, num_warps=4,
    )  # fmt: skip
    return out


def _counters_on(device: torch.device, blocks: int) -> Tensor:
    """Zeros, which a product leaves as it found them; captured ones keep their address."""
    if device not in _counters:
        _counters[device] = torch.zeros(1 << 16, dtype=torch.int32, device=device)
    assert blocks <= len(_counters[device])
    return _counters[device]
