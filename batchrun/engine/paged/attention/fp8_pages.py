"""Keys and values in fp8 (e4m3), each token's of a head with a scale of its own: written, and read back.

A number is `fp8 * scale`, where the scale maps the largest absolute value to the largest that e4m3 has, as in
`batchrun.engine.layers.fp8`. The scales are beside the pages, as (pages, kv heads, page size): kernels read those of a
head's tokens in a row.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, untyped-decorator, no-untyped-call"

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def quantized(x):
    """The last axis of x in fp8, and its scales."""
    x = x.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), axis=-1, keep_dims=True), 1e-12)
    # Rounded as torch divides by a tensor.
    return (x * (tl.div_rn(1.0, largest) * 448.0)).to(tl.float8e4nv), largest / 448.0


@triton.jit
def normalized(q, scale):
    """q in what products with fp8 are computed in, each row's largest number 1, and the scale of the row's scores.

    That is float16, to which a GPU converts fp8 best. Only plain float32, of a CPU, stays as it is.
    """
    largest = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), axis=1), 1e-30)
    half: tl.constexpr = tl.float32 if q.dtype == tl.float32 else tl.float16
    return (q.to(tl.float32) / largest[:, None]).to(half), scale * largest


@triton.jit
def widened_pairs(pairs, dtype: tl.constexpr):
    """The even and the odd columns of numbers in fp8, which are loaded as int16, two of them at once.

    For the matrix unit must have values column by column, and a GPU turns no smaller numbers than 16 bits around on
    their way to it.
    """
    if INTERPRETED or dtype != tl.float16:
        even, odd = (pairs & 255).to(tl.uint8), ((pairs >> 8) & 255).to(tl.uint8)
        even, odd = (
            even.to(tl.float8e4nv, bitcast=True).to(dtype),
            odd.to(tl.float8e4nv, bitcast=True).to(dtype),
        )
    else:
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 even, odd;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {even, odd}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, even;
            cvt.rn.f16x2.e4m3x2 $1, odd;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return even, odd


@triton.jit
def joined(pair):
    """Columns from their even and their odd ones."""
    return tl.reshape(tl.join(pair[0], pair[1]), (pair[0].shape[0], 2 * pair[0].shape[1]))


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def _write_quantized(
    key, value, key_cache, value_cache, key_scales, value_scales, key_back, value_back, slot_mapping,
    key_stride, value_stride,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    head, column = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    offset = head * HEAD_DIM + column
    mask_h = head < NUM_HEADS
    mask = mask_h & (column < HEAD_DIM)
    scale_offset = (slot // PAGE_SIZE * NUM_HEADS + head) * PAGE_SIZE + slot % PAGE_SIZE
    k, k_scale = quantized(tl.load(key + token * key_stride + offset, mask=mask, other=0.0))
    v, v_scale = quantized(tl.load(value + token * value_stride + offset, mask=mask, other=0.0))
    tl.store(key_cache + slot * NUM_HEADS * HEAD_DIM + offset, k, mask=mask)
    tl.store(value_cache + slot * NUM_HEADS * HEAD_DIM + offset, v, mask=mask)
    tl.store(key_scales + scale_offset, k_scale, mask=mask_h)
    tl.store(value_scales + scale_offset, v_scale, mask=mask_h)
    back_offset = token * NUM_HEADS * HEAD_DIM + offset
    tl.store(key_back + back_offset, (k.to(tl.float32) * k_scale).to(key_back.dtype.element_ty), mask=mask)
    tl.store(
        value_back + back_offset, (v.to(tl.float32) * v_scale).to(value_back.dtype.element_ty), mask=mask
    )


def write_quantized(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, scales: Tensor, slot_mapping: Tensor
) -> tuple[Tensor, Tensor]:
    """What `page_kernels.write_kv_cache` does, to pages in fp8.

    Args:
        key, value: (tokens, heads, head size), each token's heads contiguous.
        key_cache, value_cache: (pages, page size, heads, head size) fp8, contiguous.
        scales: (2, pages, heads, page size) float32, of keys and values.
        slot_mapping: (tokens,) int64, page * page size + offset.

    Returns:
        The numbers that the pages now stand for, like `key` and `value`, contiguous.
    """
    tokens, heads, head_dim = key.shape
    back = key.new_empty(key.shape), value.new_empty(value.shape)
    if tokens:
        _write_quantized[(tokens,)](
            key, value, key_cache, value_cache, scales[0], scales[1], *back, slot_mapping,
            key.stride(0), value.stride(0),
            NUM_HEADS=heads, HEAD_DIM=head_dim, PAGE_SIZE=key_cache.shape[1],
            BLOCK_H=triton.next_power_of_2(heads), BLOCK_D=triton.next_power_of_2(head_dim), num_warps=4,
        )  # fmt: skip
    return back


@triton.jit(do_not_specialize_on_alignment=["pages"])
def _widen(
    key_cache, value_cache, key_scales, value_scales, pages, keys, values,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    page = tl.load(pages + tl.program_id(0)).to(tl.int64)
    # A row is a token's head.
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)[None, :]
    rows: tl.constexpr = PAGE_SIZE * NUM_HEADS
    mask_row = row < rows
    mask = mask_row[:, None] & (column < HEAD_DIM)
    source = (page * rows + row)[:, None] * HEAD_DIM + column
    target = (tl.program_id(0).to(tl.int64) * rows + row)[:, None] * HEAD_DIM + column
    scale = (page * NUM_HEADS + row % NUM_HEADS) * PAGE_SIZE + row // NUM_HEADS
    k_scale = tl.load(key_scales + scale, mask=mask_row, other=0.0)[:, None]
    v_scale = tl.load(value_scales + scale, mask=mask_row, other=0.0)[:, None]
    k = tl.load(key_cache + source, mask=mask, other=0.0).to(tl.float32) * k_scale
    v = tl.load(value_cache + source, mask=mask, other=0.0).to(tl.float32) * v_scale
    tl.store(keys + target, k.to(keys.dtype.element_ty), mask=mask)
    tl.store(values + target, v.to(values.dtype.element_ty), mask=mask)


WIDENED_ROWS = 32
"""Heads of tokens in a block of threads."""


def widened(
    key_cache: Tensor, value_cache: Tensor, scales: Tensor, pages: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Some pages' keys and values in `dtype`.

    Args:
        key_cache, value_cache: (all pages, page size, heads, head size) fp8, contiguous.
        scales: (2, all pages, heads, page size) float32, of keys and values.
        pages: (pages,) int64, which ones.

    Returns:
        Keys and values, each (pages, page size, heads, head size), contiguous.
    """
    _, page_size, heads, head_dim = key_cache.shape
    keys, values = (
        torch.empty((len(pages), page_size, heads, head_dim), dtype=dtype, device=key_cache.device)
        for _ in range(2)
    )
    _widen[(len(pages), triton.cdiv(page_size * heads, WIDENED_ROWS))](
        key_cache, value_cache, scales[0], scales[1], pages, keys, values,
        NUM_HEADS=heads, HEAD_DIM=head_dim, PAGE_SIZE=page_size,
        BLOCK_ROWS=WIDENED_ROWS, BLOCK_D=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip
    return keys, values
