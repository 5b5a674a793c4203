"""The engine's small GPU kernels, in Triton: writing and copying pages, joining two attentions, a top-p threshold."""

# mypy: disable-error-code="no-untyped-def, attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize_on_alignment=["places"])
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


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["sources", "targets"])
def _copy(
    memory, sources, targets, pages, tokens, WIDTH: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr
):
    plane = tl.program_id(1).to(tl.int64) * pages
    source = (plane + tl.load(sources + tl.program_id(0))) * PAGE * WIDTH
    target = (plane + tl.load(targets + tl.program_id(0))) * PAGE * WIDTH
    for start in range(0, tokens * WIDTH, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < tokens * WIDTH
        tl.store(memory + target + place, tl.load(memory + source + place, mask=inside), mask=inside)


def copy(memory: Tensor, sources: Tensor, targets: Tensor, tokens: int) -> None:
    """The first `tokens` tokens of each source page, in all planes, to its target page; needs no memory besides.

    Args:
        memory: (planes, pages, page size, numbers), contiguous.
        sources, targets: (copies,) int64; no target is a source.
    """
    planes, pages, page_size, width = memory.shape
    _copy[(len(sources), planes)](
        memory, sources, targets, pages, tokens, WIDTH=width, PAGE=page_size, BLOCK=4096, num_warps=8
    )


@triton.jit
def _join(
    first, first_lse, second, second_lse, joined, lse, heads, lse_row, lse_head,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    tl.store(lse + row * heads + head, top + tl.log(weight_a + weight_b))


def join(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attentions over each: a mean weighted by exp(log-sum-exp).

    (Online softmax: Milakov and Gimelshein, 2018.)

    Args:
        first, second: (rows, heads, head size), contiguous.
        first_lse: (heads, rows) float32. second_lse: (rows, heads) float32, contiguous.

    Returns:
        (rows, heads, head size) and the log-sum-exp over both, (rows, heads) float32.
    """
    rows, heads, size = first.shape
    joined, lse = torch.empty_like(second), torch.empty_like(second_lse)
    _join[(rows, heads)](
        first, first_lse, second, second_lse, joined, lse, heads, first_lse.stride(1), first_lse.stride(0),
        SIZE=size, BLOCK=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip
    return joined, lse


@triton.jit
def _top_p(probabilities, lowest, size, top_p, BLOCK: tl.constexpr):
    row = probabilities + tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    low, high = (
        0,
        0x3F800001,
    )  # the bits of 0 and of what follows 1: in between, bits are in the floats' order
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
