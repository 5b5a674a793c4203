"""Attention of decode steps over pages on a GPU, in Triton: FlashAttention-2 (Dao, 2023), split over long sequences."""

# mypy: disable-error-code="no-untyped-def, attr-defined, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchrun.engine.paged.attention.architecture import Layer
from batchrun.engine.paged.attention.fp8_pages import joined, normalized, quantized
from batchrun.engine.paged.attention.online_softmax import (
    LOG2_E,
    attend,
    fitting_blocks,
    shared_memory,
    softcapped,
)

# Numbers and addresses that differ from call to call and make no code faster are not compiled for: each variant would
# cost a run that meets it first about two seconds.

# Keys in a block and blocks in flight, best first.
DECODE_BLOCKS = ((128, 2), (64, 2), (32, 2), (16, 1))
SPLIT_BLOCKS = ((64, 3), (64, 2), (32, 2), (16, 1))
# Of what is behind shared prefixes, mostly few keys, and the numbers of a result up to which one warp holds it: more
# sequences at once on each processor. On an H200, 16 query heads and 8 key heads, microseconds, blocks as above and
# these: 2,040 sequences with 46 keys behind their prefixes 236 and 104; 1,000 with 60 keys 120 and 70; 1,024 with 600
# keys 574 and 575; 600 with 250 keys 151 and 157.
REST_BLOCKS, REST_WARPS, MAX_REST_NUMBERS = ((16, 2),), 1, 2048
# Of keys in fp8, with half the warps for heads of up to 128 numbers: what they do to convert them counts more than how
# many they have in flight. On an H200, 8 key heads and 32 query heads, microseconds with 2 warps, with 4 at best and in
# bfloat16: 1,024 sequences of 600 tokens 370, 400 and 590; 64 of 8,000 292, 302 and 492; 300 of 20 to 3,300 329, 324
# and 501.
FP8_BLOCKS = ((128, 2), (64, 2), (32, 2), (16, 1))
# So many sequences are short, and most of them end within a smaller block. With 16 query heads, blocks as above and
# these: 1,500 of 70 to 320 tokens 194 and 165; 1,100 of 260 to 500 253 and 230; 560 of 460 to 700 187 and 181; but 200
# of 4,000 to 24,000 965 and 994.
MANY_FP8_BLOCKS, _MANY = FP8_BLOCKS[1:], 4096

_MIN_UNSPLIT_BLOCKS = 1280
"""Blocks of threads from which a decode step is not split any further. On an H100, 60 sequences of about 8,000 tokens
and 8 key heads: 2.95 TB/s split, 2.59 not; 16 sequences 2.71 and 1.62; 4 sequences 1.86 and 0.68; 128 sequences of
1,500 the same. On an H200 and in fp8, 113 sequences of about 9,000 tokens: 3.78 and 3.49; 150 3.83 and 3.97."""


@triton.jit
def _first_key(seq_len, start, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the blocks of keys begin that a sequence's last token sees, from its key `start` on."""
    first = start
    if WINDOW > 0:
        first = tl.maximum(seq_len - WINDOW, start)
    return first // BLOCK_N * BLOCK_N


@triton.jit(
    do_not_specialize=["split_size", "block_table_stride", "num_seqs"],
    do_not_specialize_on_alignment=["slot_mapping", "block_tables", "seq_lens", "starts"],
)
def _decode(
    query, key, value, key_cache, value_cache, key_scales, value_scales, slot_mapping, block_tables, seq_lens, starts,
    out, lse, scale, softcap, split_size,
    query_seq_stride, query_head_stride, key_seq_stride, value_seq_stride, block_table_stride, num_seqs,
    NUM_KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
    SPLIT_KV: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    seq, head = tl.program_id(0) // NUM_KV_HEADS, tl.program_id(0) % NUM_KV_HEADS
    seq_len = tl.load(seq_lens + seq)
    seq_start = tl.load(starts + seq) if STARTS else 0
    first = _first_key(seq_len, seq_start, WINDOW, BLOCK_N)
    stop = seq_len - 1
    split = tl.program_id(1)
    if SPLIT_KV:
        first += split * split_size
        if (split > 0) & (first >= stop):
            return
        stop = tl.minimum(first + split_size, stop)
    offs_m = tl.arange(0, BLOCK_M)  # GROUP_SIZE of them share a key
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < GROUP_SIZE
    mask_d = offs_d < HEAD_DIM
    long_seq = seq.to(tl.int64)
    query_ptrs = (
        query
        + long_seq * query_seq_stride
        + (head * GROUP_SIZE + offs_m[:, None]) * query_head_stride
        + offs_d[None, :]
    )
    q = tl.load(query_ptrs, mask=mask_m[:, None] & mask_d[None, :], other=0.0)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    if key_scales is not None:
        q, scale = normalized(q, scale)
        half = tl.zeros((BLOCK_M, BLOCK_D // 2), tl.float32)
        acc = (half, half)
        value_pairs = value_cache.to(tl.pointer_type(tl.int16), bitcast=True)
        offs_pair = tl.arange(0, BLOCK_D // 2)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if split == 0:
        # The sequence's new token goes to its page and begins the softmax; nobody else reads or writes it in this step.
        new_key = tl.load(key + long_seq * key_seq_stride + head * HEAD_DIM + offs_d, mask=mask_d, other=0.0)
        new_value = tl.load(
            value + long_seq * value_seq_stride + head * HEAD_DIM + offs_d, mask=mask_d, other=0.0
        )
        slot = tl.load(slot_mapping + seq)
        new_offset = (slot * NUM_KV_HEADS + head) * HEAD_DIM + offs_d
        if key_scales is not None:
            new_scale = (slot // PAGE_SIZE * NUM_KV_HEADS + head) * PAGE_SIZE + slot % PAGE_SIZE
            new_key, new_key_scale = quantized(new_key)
            new_value, new_value_scale = quantized(new_value)
            tl.store(key_scales + new_scale + tl.arange(0, 1), new_key_scale)
            tl.store(value_scales + new_scale + tl.arange(0, 1), new_value_scale)
        tl.store(key_cache + new_offset, new_key, mask=mask_d)
        tl.store(value_cache + new_offset, new_value, mask=mask_d)
        if key_scales is not None:
            # It is seen as later steps will see it.
            new_key = new_key.to(tl.float32) * new_key_scale
            new_value = new_value.to(tl.float32) * new_value_scale
        m_i = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], axis=1)
        m_i = softcapped(m_i, scale, softcap) if SOFTCAP else m_i * scale
        l_i += 1.0
        if key_scales is not None:
            even, odd = tl.split(tl.reshape(new_value, (BLOCK_D // 2, 2)))
            acc = (acc[0] + even[None, :], acc[1] + odd[None, :])
        else:
            acc += new_value.to(tl.float32)[None, :]
    for start in tl.range(first, stop, BLOCK_N, num_stages=NUM_STAGES):
        page = tl.load(block_tables + long_seq * block_table_stride + start // PAGE_SIZE).to(tl.int64)
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < seq_len - 1
        if STARTS:
            mask_n = mask_n & (offs_n >= seq_start)
        if WINDOW > 0:
            mask_n = mask_n & (offs_n >= seq_len - WINDOW)
        kv_offset = ((page * PAGE_SIZE + offs_n % PAGE_SIZE) * NUM_KV_HEADS + head) * HEAD_DIM
        k = tl.load(
            key_cache + kv_offset[None, :] + offs_d[:, None],
            mask=mask_n[None, :] & mask_d[:, None],
            other=0.0,
        )
        k_scale, v_scale = None, None
        if key_scales is not None:
            scale_offset = (page * NUM_KV_HEADS + head) * PAGE_SIZE + offs_n % PAGE_SIZE
            k_scale = tl.load(key_scales + scale_offset, mask=mask_n, other=0.0)
            v_scale = tl.load(value_scales + scale_offset, mask=mask_n, other=0.0)
            v = tl.load(
                value_pairs + kv_offset[:, None] // 2 + offs_pair[None, :],
                mask=mask_n[:, None] & (offs_pair < HEAD_DIM // 2)[None, :],
                other=0,
            )
        else:
            v = tl.load(
                value_cache + kv_offset[:, None] + offs_d[None, :],
                mask=mask_n[:, None] & mask_d[None, :],
                other=0.0,
            )
        m_i, l_i, acc = attend(
            q, k, v, k_scale, v_scale, mask_n[None, :], m_i, l_i, acc, scale, softcap, SOFTCAP, True
        )  # fmt: skip
    out_offset = (
        (split.to(tl.int64) * num_seqs + long_seq) * NUM_KV_HEADS * GROUP_SIZE + head * GROUP_SIZE + offs_m
    )
    if key_scales is not None:
        acc = joined(acc)
    out_mask = mask_m[:, None] & mask_d[None, :]
    tl.store(
        out + out_offset[:, None] * HEAD_DIM + offs_d[None, :],
        (acc / l_i[:, None]).to(out.dtype.element_ty),
        mask=out_mask,
    )
    tl.store(lse + out_offset, (m_i + tl.log2(l_i)) * 0.6931471805599453, mask=mask_m)


def decode(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor, starts: Tensor | None, layer: Layer, scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes each sequence's new key and value to its pages as `write_kv_cache` does, and attends over them.

    A block of threads for each sequence and key head; where those are too few to fill the device or too unlike, one
    for each split of a sequence's keys (Flash-Decoding: Dao et al., 2023).

    Args:
        query: (sequences, query heads, head size), a head's numbers contiguous.
        key, value: (sequences, kv heads, head size), each sequence's heads contiguous.
        key_cache, value_cache: (pages, page size, kv heads, head size), contiguous.
        slot_mapping: (sequences,) int64, where the new ones go: the last of the sequence's tokens.
        block_tables: (sequences, pages) int32. seq_lens: (sequences,) int32, the new token included.
        starts: (sequences,) int32, the first of each sequence's keys that are attended over; all of them without it.
        scales: (2, pages, kv heads, page size) float32, of keys and values where the cache is in fp8.

    Returns:
        (sequences, query heads, head size), and the scores' log-sum-exp (sequences, query heads) float32.
    """
    num_seqs, heads, head_dim = query.shape
    group_size = heads // layer.kv_heads
    block_m = decode_block_m(group_size)
    out = torch.empty((num_seqs, heads, head_dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((num_seqs, heads), dtype=torch.float32, device=query.device)
    split_size = _split_size(num_seqs)
    max_keys = min(block_tables.shape[1] * key_cache.shape[1], layer.window or 1 << 30)
    num_splits = 1 if num_seqs * layer.kv_heads >= _MIN_UNSPLIT_BLOCKS else triton.cdiv(max_keys, split_size)
    block_d = triton.next_power_of_2(head_dim)
    warps = decode_warps(block_d, scales is not None)
    choices: tuple[tuple[int, int], ...] = DECODE_BLOCKS
    if scales is not None:
        choices = MANY_FP8_BLOCKS if num_seqs * layer.kv_heads >= _MANY else FP8_BLOCKS
    elif num_splits > 1:
        choices = SPLIT_BLOCKS
    elif starts is not None and block_m * block_d <= MAX_REST_NUMBERS:
        choices, warps = REST_BLOCKS, REST_WARPS
    block_n, num_stages = fitting_blocks(choices, block_m, block_d * key_cache.itemsize, shared_memory(query))
    if num_splits > 1:
        # A window's first block of keys begins before the window.
        num_splits = triton.cdiv(max_keys + block_n, split_size) if layer.window else num_splits
        split_out = torch.empty(
            (num_splits, num_seqs, heads, head_dim), dtype=torch.float32, device=query.device
        )
        split_lse = torch.empty((num_splits, num_seqs, heads), dtype=torch.float32, device=query.device)
    else:
        split_out, split_lse = out, lse
    first_keys = seq_lens if starts is None else starts
    _decode[(num_seqs * layer.kv_heads, num_splits)](
        query, key, value, key_cache, value_cache, *(scales if scales is not None else (None, None)), slot_mapping,
        block_tables, seq_lens, first_keys, split_out, split_lse,
        layer.scale * (1.0 if layer.softcap else LOG2_E), layer.softcap or 0.0, split_size,
        query.stride(0), query.stride(1), key.stride(0), value.stride(0), block_tables.stride(0), num_seqs,
        NUM_KV_HEADS=layer.kv_heads, GROUP_SIZE=group_size, BLOCK_M=block_m, HEAD_DIM=head_dim,
        PAGE_SIZE=key_cache.shape[1],
        WINDOW=layer.window or 0, SOFTCAP=layer.softcap is not None,
        BLOCK_N=block_n, BLOCK_D=block_d, NUM_STAGES=num_stages, SPLIT_KV=num_splits > 1,
        STARTS=starts is not None, num_warps=warps,
    )  # fmt: skip
    if num_splits > 1:
        _combine[(num_seqs, heads)](
            split_out, split_lse, seq_lens, first_keys, out, lse, split_size, num_seqs,
            NUM_HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=block_d, WINDOW=layer.window or 0, BLOCK_N=block_n,
            STARTS=starts is not None, num_warps=1,
        )  # fmt: skip
    return out, lse


@triton.jit(
    do_not_specialize=["split_size", "num_seqs"], do_not_specialize_on_alignment=["seq_lens", "starts"]
)
def _combine(
    split_out, split_lse, seq_lens, starts, out, lse, split_size, num_seqs,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
    STARTS: tl.constexpr,
):  # fmt: skip
    seq, head = tl.program_id(0), tl.program_id(1)
    seq_len = tl.load(seq_lens + seq)
    seq_start = tl.load(starts + seq) if STARTS else 0
    num_splits = tl.maximum(
        tl.cdiv(seq_len - 1 - _first_key(seq_len, seq_start, WINDOW, BLOCK_N), split_size), 1
    )
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    head_row = seq.to(tl.int64) * NUM_HEADS + head
    m_i, l_i, acc = float("-inf"), 0.0, tl.zeros((BLOCK_D,), tl.float32)
    for split in range(0, num_splits):
        split_row = head_row + split * num_seqs * NUM_HEADS
        lse_i = tl.load(split_lse + split_row)
        split_values = tl.load(split_out + split_row * HEAD_DIM + offs_d, mask=mask_d, other=0.0)
        m_new = tl.maximum(m_i, lse_i)
        alpha, beta = tl.exp(m_i - m_new), tl.exp(lse_i - m_new)
        m_i, l_i, acc = m_new, l_i * alpha + beta, acc * alpha + split_values * beta
    tl.store(out + head_row * HEAD_DIM + offs_d, (acc / l_i).to(out.dtype.element_ty), mask=mask_d)
    tl.store(lse + head_row, m_i + tl.log(l_i))


def decode_block_m(group_size: int) -> int:
    """Rows that a group's heads take in a decode step's products; a matrix unit takes 16 at least."""
    return int(max(16, triton.next_power_of_2(group_size)))


def decode_warps(block_d: int, fp8: bool) -> int:
    """Of a block of threads of a decode step."""
    return 2 if fp8 and block_d <= 128 else 4


def _split_size(num_seqs: int) -> int:
    """Keys of a sequence for one block of threads of a split decode step: few sequences are cut finer."""
    return 1024 if num_seqs >= 16 else 512
