"""Keys and values written into pages, and pages copied, on a GPU, in Triton."""

# mypy: disable-error-code="no-untyped-def, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def _write_kv_cache(
    key, value, key_cache, value_cache, slot_mapping, key_stride, value_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0)
    slot = tl.load(slot_mapping + token)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    tl.store(
        key_cache + slot * WIDTH + column, tl.load(key + token * key_stride + column, mask=mask), mask=mask
    )
    tl.store(
        value_cache + slot * WIDTH + column,
        tl.load(value + token * value_stride + column, mask=mask),
        mask=mask,
    )


def write_kv_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """key_cache[slot_mapping[i]] = key[i], and the same for values.

    Args:
        key, value: (tokens, heads, head size), each token's heads contiguous.
        key_cache, value_cache: (pages, page size, heads, head size), contiguous.
        slot_mapping: (tokens,) int64, page * page size + offset.
    """
    tokens, heads, head_dim = key.shape
    width = heads * head_dim
    if tokens:
        _write_kv_cache[(tokens,)](
            key, value, key_cache, value_cache, slot_mapping, key.stride(0), value.stride(0),
            WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["sources", "targets", "tokens"])
def _copy_pages(
    memory, sources, targets, tokens, pages, WIDTH: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    plane = tl.program_id(1).to(tl.int64) * pages
    source = (plane + tl.load(sources + tl.program_id(0))) * PAGE_SIZE * WIDTH
    target = (plane + tl.load(targets + tl.program_id(0))) * PAGE_SIZE * WIDTH
    size = tl.load(tokens + tl.program_id(0)).to(tl.int32) * WIDTH
    for start in range(0, size, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        mask = offset < size
        tl.store(memory + target + offset, tl.load(memory + source + offset, mask=mask), mask=mask)


def copy_pages(memory: Tensor, sources: Tensor, targets: Tensor, tokens: Tensor) -> None:
    """The first tokens of each source page, in all planes, to its target page; needs no memory besides.

    Args:
        memory: (planes, pages, page size, numbers), contiguous.
        sources, targets: (copies,) int64; no target is a source.
        tokens: (copies,) int64, how many of each.
    """
    planes, pages, page_size, width = memory.shape
    _copy_pages[(len(sources), planes)](
        memory, sources, targets, tokens, pages, WIDTH=width, PAGE_SIZE=page_size, BLOCK=4096, num_warps=8
    )
