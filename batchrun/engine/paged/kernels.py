"""The small GPU kernels that no library has."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchrun.engine.paged.architecture import Layer

LOG2_E = 1.4426950408889634


@triton.jit
def _write(
    key, value, keys, values, places, key_stride, value_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0)
    place = tl.load(places + token)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    tl.store(
        keys + place * WIDTH + column, tl.load(key + token * key_stride + column, mask=inside), mask=inside
    )
    tl.store(
        values + place * WIDTH + column,
        tl.load(value + token * value_stride + column, mask=inside),
        mask=inside,
    )


def write(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> None:
    """keys[places[i]] = key[i], and the same for values.

    Args:
        key, value: (tokens, heads, head size), each token's heads contiguous.
        keys, values: (pages, page size, heads, head size), contiguous.
        places: (tokens,) int64, page * page size + offset.
    """
    tokens, heads, head_dim = key.shape
    width = heads * head_dim
    if tokens:
        _write[(tokens,)](
            key, value, keys, values, places, key.stride(0), value.stride(0),
            WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip


@triton.jit
def _join(
    first,
    first_lse,
    second,
    second_lse,
    joined,
    heads,
    lse_row,
    lse_head,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    a = tl.load(first_lse + head * lse_head + row * lse_row)
    b = tl.load(second_lse + row * heads + head)
    top = tl.maximum(a, b)
    weight_a, weight_b = tl.exp(a - top), tl.exp(b - top)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    place = (row * heads + head) * SIZE + column
    x = tl.load(first + place, mask=inside).to(tl.float32)
    y = tl.load(second + place, mask=inside).to(tl.float32)
    mixed = (x * weight_a + y * weight_b) / (weight_a + weight_b)
    tl.store(joined + place, mixed.to(joined.dtype.element_ty), mask=inside)


def join(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> Tensor:
    """Attention over two sets of keys from the attentions over each: a mean weighted by exp(log-sum-exp).

    (Online softmax: Milakov and Gimelshein, 2018.)

    Args:
        first, second: (rows, heads, head size), contiguous.
        first_lse: (heads, rows) float32. second_lse: (rows, heads) float32, contiguous.
    """
    rows, heads, size = first.shape
    joined = torch.empty_like(second)
    _join[(rows, heads)](
        first, first_lse, second, second_lse, joined, heads, first_lse.stride(1), first_lse.stride(0),
        SIZE=size, BLOCK=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip
    return joined


@triton.jit
def _top_p(probabilities, lowest, size, top_p, BLOCK: tl.constexpr):
    row = probabilities + tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    low, high = (
        0,
        0x3F800001,
    )  # the bits of 0 and of what follows 1; floats between are in the order of their bits
    for _ in range(31):
        middle = low + (high - low) // 2
        mass = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):
            p = tl.load(row + start + column, mask=start + column < size, other=0.0)
            mass += tl.where(p.to(tl.int32, bitcast=True) >= middle, p, 0.0)
        enough = tl.sum(mass, axis=0) >= top_p
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    # Rounding may keep every sum below top_p: then all tokens stay. Else the smallest that is needed.
    tl.store(lowest + tl.program_id(0), low.to(tl.float32, bitcast=True))


def top_p_threshold(probabilities: Tensor, top_p: float) -> Tensor:
    """See `sampler.top_p_threshold`: tokens at or above the result are those at or above the smallest one needed.

    By bisection over the bits of a float, a pass over the row each: to sort 150,000 tokens for a thousand rows takes
    longer than the decode step itself.
    """
    probabilities = probabilities.contiguous()
    lowest = torch.empty(len(probabilities), 1, dtype=torch.float32, device=probabilities.device)
    _top_p[(len(probabilities),)](
        probabilities, lowest, probabilities.shape[1], top_p, BLOCK=4096, num_warps=8
    )
    return lowest


@triton.jit
def _decode(
    query, keys, values, tables, lengths, out, lse, scale, softcap, query_row, query_head, table_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    length = tl.load(lengths + row)
    member = tl.arange(0, 16)  # a matrix unit takes 16 queries at least; GROUP of them share a key
    column = tl.arange(0, COLUMNS)
    own = member < GROUP
    inside = column < SIZE
    places = (
        query + row.to(tl.int64) * query_row + (head * GROUP + member[:, None]) * query_head + column[None, :]
    )
    q = tl.load(places, mask=own[:, None] & inside[None, :], other=0.0)
    top = tl.full((16,), float("-inf"), tl.float32)
    total = tl.zeros((16,), tl.float32)
    sums = tl.zeros((16, COLUMNS), tl.float32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // BLOCK * BLOCK
    for start in tl.range(first, length, BLOCK, num_stages=STAGES):
        page = tl.load(tables + row.to(tl.int64) * table_row + start // PAGE).to(tl.int64)
        token = start + tl.arange(0, BLOCK)
        seen = token < length
        if WINDOW > 0:
            seen = seen & (token >= length - WINDOW)
        offset = ((page * PAGE + token % PAGE) * KV_HEADS + head) * SIZE
        k = tl.load(keys + offset[None, :] + column[:, None], mask=seen[None, :] & inside[:, None], other=0.0)
        score = tl.dot(q, k) * scale  # in units of log 2
        if SOFTCAP:  # tanh, by the powers of two that the GPU has an instruction for
            bent = 2.0 / (1.0 + tl.exp2(-2.0 * 1.4426950408889634 * score / softcap)) - 1.0
            score = softcap * 1.4426950408889634 * bent
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        shrink = tl.exp2(top - higher)
        weight = tl.exp2(score - higher[:, None])
        v = tl.load(
            values + offset[:, None] + column[None, :], mask=seen[:, None] & inside[None, :], other=0.0
        )
        sums = sums * shrink[:, None] + tl.dot(weight.to(v.dtype), v)
        total = total * shrink + tl.sum(weight, axis=1)
        top = higher
    place = row.to(tl.int64) * KV_HEADS * GROUP + head * GROUP + member
    mean = sums / total[:, None]
    tl.store(
        out + place[:, None] * SIZE + column[None, :],
        mean.to(out.dtype.element_ty),
        mask=own[:, None] & inside[None, :],
    )
    tl.store(lse + place, (top + tl.log2(total)) * 0.6931471805599453, mask=own)


def decode(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, layer: Layer,
    block: int = 128, warps: int = 4, stages: int = 2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of one query per row over its pages, a block of threads for each row and key head.

    Args:
        query: (rows, query heads, head size), a head's numbers contiguous.
        keys, values: (pages, page size, kv heads, head size), contiguous.
        tables: (rows, pages) int32. lengths: (rows,) int32, at least 1.

    Returns:
        (rows, query heads, head size), and the scores' log-sum-exp (rows, query heads) float32.
    """
    rows, heads, size = query.shape
    out = torch.empty((rows, heads, size), dtype=query.dtype, device=query.device)
    lse = torch.empty((rows, heads), dtype=torch.float32, device=query.device)
    _decode[(rows * layer.kv_heads,)](
        query, keys, values, tables, lengths, out, lse,
        layer.scale * (1.0 if layer.softcap else LOG2_E), layer.softcap or 0.0,
        query.stride(0), query.stride(1), tables.stride(0),
        KV_HEADS=layer.kv_heads, GROUP=heads // layer.kv_heads, SIZE=size, PAGE=keys.shape[1],
        WINDOW=layer.window or 0, SOFTCAP=layer.softcap is not None,
        BLOCK=block, COLUMNS=triton.next_power_of_2(size), STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out, lse
