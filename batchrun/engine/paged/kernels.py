"""The two small GPU kernels that no library has: writing keys and values to pages, and joining two attentions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["tokens"])
def _write(
    key, value, keys, values, places, tokens, key_stride, value_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
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
            key, value, keys, values, places, tokens, key.stride(0), value.stride(0),
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
