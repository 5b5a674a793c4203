"""Attention over prefixes that several sequences have in common, on a GPU, in Triton.

FlashAttention-2 (Dao, 2023) with the queries of a group's sequences side by side; see `cascade` for who is in a group.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchrun.engine.paged.attention.architecture import Layer
from batchrun.engine.paged.attention.cascade import ITEM_WIDTH, MEMBER_WIDTH
from batchrun.engine.paged.attention.fp8_pages import normalized
from batchrun.engine.paged.attention.metadata import SharedPrefixes
from batchrun.engine.paged.attention.online_softmax import LOG2_E, attend, fitting_blocks, shared_memory

# Keys in a block and blocks in flight, best first.
CASCADE_BLOCKS = ((64, 3), (64, 2), (32, 2), (16, 1))
# Queries in a block of threads, few and many, and its warps. On an H200, a layer of 16 query heads and 8 key heads in
# microseconds: 40 groups of 25 rows with 4,000 tokens 200 and 250, 20 groups of 100 rows 300 and 250; large blocks of 8
# warps 310 for both.
CASCADE_BLOCK_QUERIES, CASCADE_WARPS = (64, 128), 4


@triton.jit(
    do_not_specialize=["block_table_stride"],
    do_not_specialize_on_alignment=["block_tables", "members", "items"],
)
def _attend_prefixes(
    query, key_cache, value_cache, key_scales, value_scales, block_tables, members, items, out, lse, scale, softcap,
    query_token_stride, query_head_stride, block_table_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr, ITEM: tl.constexpr, MEMBER: tl.constexpr,
):  # fmt: skip
    item = items + tl.program_id(0) // NUM_KV_HEADS * ITEM
    head = tl.program_id(0) % NUM_KV_HEADS
    num_members = tl.load(item + 1)
    if num_members == 0:
        return
    first_member, leader, result = tl.load(item), tl.load(item + 2), tl.load(item + 5)
    first, stop = tl.load(item + 3), tl.load(item + 4)
    # A member's heads that have their keys in common stand side by side.
    offs_m = tl.arange(0, BLOCK_M)
    number = offs_m // GROUP_SIZE
    mask_m = number < num_members
    query_head = head * GROUP_SIZE + offs_m % GROUP_SIZE
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    token = tl.load(members + (first_member + number) * MEMBER, mask=mask_m, other=0).to(tl.int64)
    q = tl.load(
        query + (token * query_token_stride + query_head * query_head_stride)[:, None] + offs_d[None, :],
        mask=mask_m[:, None] & mask_d[None, :],
        other=0.0,
    )
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if key_scales is not None:
        q, scale = normalized(q, scale)
    pages = block_tables + leader.to(tl.int64) * block_table_stride
    # Blocks without a mask are faster by far; the last one may have fewer keys.
    whole_stop = stop // BLOCK_N * BLOCK_N
    for start in tl.range(first, whole_stop, BLOCK_N, num_stages=NUM_STAGES):
        page = tl.load(pages + start // PAGE_SIZE).to(tl.int64)
        kv_token = page * PAGE_SIZE + start % PAGE_SIZE
        kv_offset = ((kv_token + offs_n) * NUM_KV_HEADS + head) * HEAD_DIM
        k_scale, v_scale = None, None
        if key_scales is not None:
            scale_offset = (page * NUM_KV_HEADS + head) * PAGE_SIZE + start % PAGE_SIZE + offs_n
            k_scale, v_scale = tl.load(key_scales + scale_offset), tl.load(value_scales + scale_offset)
        k = tl.load(key_cache + kv_offset[None, :] + offs_d[:, None], mask=mask_d[:, None], other=0.0)
        v = tl.load(value_cache + kv_offset[:, None] + offs_d[None, :], mask=mask_d[None, :], other=0.0)
        m_i, l_i, acc = attend(
            q, k, v, k_scale, v_scale, mask_m[:, None], m_i, l_i, acc, scale, softcap, SOFTCAP, False
        )  # fmt: skip
    if whole_stop < stop:
        page = tl.load(pages + whole_stop // PAGE_SIZE).to(tl.int64)
        kv_token = page * PAGE_SIZE + whole_stop % PAGE_SIZE
        kv_offset = ((kv_token + offs_n) * NUM_KV_HEADS + head) * HEAD_DIM
        mask_n = whole_stop + offs_n < stop
        k_scale, v_scale = None, None
        if key_scales is not None:
            scale_offset = (page * NUM_KV_HEADS + head) * PAGE_SIZE + whole_stop % PAGE_SIZE + offs_n
            k_scale = tl.load(key_scales + scale_offset, mask=mask_n, other=0.0)
            v_scale = tl.load(value_scales + scale_offset, mask=mask_n, other=0.0)
        k = tl.load(
            key_cache + kv_offset[None, :] + offs_d[:, None],
            mask=mask_n[None, :] & mask_d[:, None],
            other=0.0,
        )
        v = tl.load(
            value_cache + kv_offset[:, None] + offs_d[None, :],
            mask=mask_n[:, None] & mask_d[None, :],
            other=0.0,
        )
        m_i, l_i, acc = attend(
            q, k, v, k_scale, v_scale, mask_n[None, :], m_i, l_i, acc, scale, softcap, SOFTCAP, True
        )  # fmt: skip
    place = (result + number).to(tl.int64) * NUM_KV_HEADS * GROUP_SIZE + query_head
    tl.store(
        out + place[:, None] * HEAD_DIM + offs_d[None, :],
        acc / l_i[:, None],
        mask=mask_m[:, None] & mask_d[None, :],
    )
    tl.store(lse + place, (m_i + tl.log2(l_i)) * 0.6931471805599453, mask=mask_m)


@triton.jit(do_not_specialize_on_alignment=["members"])
def _merge_prefixes(
    prefix_out, prefix_lse, members, out, lse,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MEMBER: tl.constexpr,
):  # fmt: skip
    member, head = members + tl.program_id(0) * MEMBER, tl.program_id(1)
    pieces = tl.load(member + 3)
    if pieces == 0:
        return
    token, first, apart = tl.load(member).to(tl.int64), tl.load(member + 1).to(tl.int64), tl.load(member + 2)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    head_row = token * NUM_HEADS + head
    # What is behind the prefix begins the softmax.
    m_i, l_i = tl.load(lse + head_row), 1.0
    acc = tl.load(out + head_row * HEAD_DIM + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    for piece in range(0, pieces):
        place = (first + piece * apart) * NUM_HEADS + head
        lse_i = tl.load(prefix_lse + place)
        values = tl.load(prefix_out + place * HEAD_DIM + offs_d, mask=mask_d, other=0.0)
        m_new = tl.maximum(m_i, lse_i)
        alpha, beta = tl.exp(m_i - m_new), tl.exp(lse_i - m_new)
        m_i, l_i, acc = m_new, l_i * alpha + beta, acc * alpha + values * beta
    tl.store(out + head_row * HEAD_DIM + offs_d, (acc / l_i).to(out.dtype.element_ty), mask=mask_d)
    tl.store(lse + head_row, m_i + tl.log(l_i))


def merge_prefixes(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, shared: SharedPrefixes,
    layer: Layer, out: Tensor, lse: Tensor, scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Attends over the prefixes of a plan's groups and merges that into what their tokens have of their own.

    Args:
        query: (tokens, query heads, head size), a head's numbers contiguous.
        key_cache, value_cache: (pages, page size, kv heads, head size), contiguous.
        block_tables: (sequences, pages) int32.
        shared: who reads what.
        out: (tokens, query heads, head size), contiguous: attention over the keys behind each token's prefix; then
            over all of its keys.
        lse: (tokens, query heads) float32, contiguous: the log-sum-exp of the scores; likewise.
        scales: (2, pages, kv heads, page size) float32, of keys and values where the cache is in fp8.
    """
    _, heads, head_dim = query.shape
    group_size, block_d = heads // layer.kv_heads, triton.next_power_of_2(head_dim)
    block_n, num_stages = fitting_blocks(
        CASCADE_BLOCKS, shared.block_queries, block_d * query.itemsize, shared_memory(query)
    )
    prefix_out = torch.empty((shared.results, heads, head_dim), dtype=torch.float32, device=query.device)
    prefix_lse = torch.empty((shared.results, heads), dtype=torch.float32, device=query.device)
    _attend_prefixes[(len(shared.items) * layer.kv_heads,)](
        query, key_cache, value_cache, *(scales if scales is not None else (None, None)), block_tables,
        shared.members, shared.items, prefix_out, prefix_lse,
        layer.scale * (1.0 if layer.softcap else LOG2_E), layer.softcap or 0.0,
        query.stride(0), query.stride(1), block_tables.stride(0),
        NUM_KV_HEADS=layer.kv_heads, GROUP_SIZE=group_size, HEAD_DIM=head_dim, PAGE_SIZE=key_cache.shape[1],
        SOFTCAP=layer.softcap is not None, BLOCK_M=shared.block_queries, BLOCK_N=block_n, BLOCK_D=block_d,
        NUM_STAGES=num_stages, ITEM=ITEM_WIDTH, MEMBER=MEMBER_WIDTH, num_warps=CASCADE_WARPS,
    )  # fmt: skip
    _merge_prefixes[(len(shared.members), heads)](
        prefix_out, prefix_lse, shared.members, out, lse,
        NUM_HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=block_d, MEMBER=MEMBER_WIDTH, num_warps=1,
    )  # fmt: skip


def query_blocks(layer: Layer) -> tuple[int, int]:
    """Queries in a small and in a large block of threads: those of at least one sequence that have their keys in
    common."""
    least = triton.next_power_of_2(layer.query_heads // layer.kv_heads)
    few, many = CASCADE_BLOCK_QUERIES
    return max(few, least), max(many if layer.head_dim <= 128 else few, least)
