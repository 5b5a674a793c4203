"""Attention of prefill batches on a GPU, in Triton: FlashAttention-2 (Dao, 2023), over pages or the batch itself."""

# mypy: disable-error-code="no-untyped-def, attr-defined, untyped-decorator, no-untyped-call"

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from batchrun.engine.layers.descriptors import is_describable
from batchrun.engine.paged.attention.architecture import Layer
from batchrun.engine.paged.attention.devices import is_gpu
from batchrun.engine.paged.attention.metadata import LONG_SEQLEN
from batchrun.engine.paged.attention.online_softmax import LOG2_E, attend, fitting_blocks, shared_memory
from batchrun.errors import one_line

# Numbers and addresses that differ from call to call and make no code faster are not compiled for: each variant would
# cost a run that meets it first about two seconds.

_MAX_PACKED_HEADS = 16


class Tile(NamedTuple):
    """Queries and keys in a block, blocks in flight, warps, and registers of a thread, if it could do with more."""

    block_m: int
    block_n: int
    num_stages: int
    num_warps: int
    registers: int | None = None


# Keys in a block and blocks in flight, best first.
PREFILL_BLOCKS = ((64, 3), (64, 2), (32, 2), (16, 1))
# Queries in a block of threads, and its warps.
PREFILL_BLOCK_M, PREFILL_WARPS = 64, 4

LONG_TILES, LONG_MEMORY = {True: Tile(128, 128, 2, 8), False: Tile(128, 128, 3, 8)}, 232448
"""Prefills with a sequence of `LONG_SEQLEN` tokens, over pages or not, take larger blocks, where one may have so many
bytes of shared memory (Hopper)."""

DESCRIBED_TILE = Tile(128, 64, 2, 8, registers=128)
"""Where the GPU copies blocks of keys by itself, so that threads need few registers and two blocks of them work at a
time. On an H200, a layer's prefill of 32 sequences of 512, 32 query heads and 4 of keys: 272 instead of 350
microseconds; 20 of 1,500, 32 and 8: 373 instead of 327 TFLOP/s; 10 of 1,500 behind as many on pages, 16 and 8: 367
instead of 317."""


@triton.jit
def _attend_keys(
    q, keys, values, block_table, query_start, seq_len, kv_column, position, first, stop, m_i, l_i, acc, scale, softcap,
    key_token_stride, value_token_stride,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PAGED: tl.constexpr,
    DESCRIBED: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Blocks of keys from `first` to `stop`: of all of them, or MASKED, of what each query sees."""
    columns = kv_column + tl.arange(0, BLOCK_D)
    for start in tl.range(first, stop, BLOCK_N, num_stages=NUM_STAGES):
        offs_n = start + tl.arange(0, BLOCK_N)
        # A block's keys are one behind the other.
        if PAGED:
            row = tl.load(block_table + start // PAGE_SIZE) * PAGE_SIZE + start % PAGE_SIZE
        else:
            row = query_start + start
        if DESCRIBED:
            k = keys.load([row, kv_column])
            v = values.load([row, kv_column])
            if MASKED:
                # What is not the sequence's counts nothing, not even if it is no number.
                v = tl.where((offs_n < seq_len)[:, None], v, 0.0)
        else:
            there = (columns < kv_column + HEAD_DIM)[None, :]
            if MASKED:
                there = there & (offs_n < seq_len)[:, None]
            token = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
            k = tl.load(keys + (token * key_token_stride)[:, None] + columns[None, :], mask=there, other=0.0)
            v = tl.load(
                values + (token * value_token_stride)[:, None] + columns[None, :], mask=there, other=0.0
            )
        mask = None
        if MASKED:
            mask = offs_n[None, :] <= position[:, None]
            if WINDOW > 0:
                mask = mask & (offs_n[None, :] > position[:, None] - WINDOW)
        m_i, l_i, acc = attend(
            q, tl.trans(k), v, None, None, mask, m_i, l_i, acc, scale, softcap, SOFTCAP, MASKED
        )
    return m_i, l_i, acc


@triton.jit(
    do_not_specialize=["block_table_stride"],
    do_not_specialize_on_alignment=["block_tables", "cu_seqlens_q", "seq_lens", "starts"],
)
def _prefill(
    query, keys, values, sinks, block_tables, cu_seqlens_q, seq_lens, starts, out, lse, scale, softcap,
    query_token_stride, query_head_stride, key_token_stride, value_token_stride, block_table_stride,
    NUM_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, PACKED_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PAGED: tl.constexpr, DESCRIBED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    # PACK heads of a group, which have their keys in common, fill a block's queries: it then spans fewer tokens, and
    # less of it is lost at a sequence's end and to keys that are too late.
    TOKENS: tl.constexpr = BLOCK_M // PACKED_HEADS
    # The last queries of a sequence see most keys: they go first, so that no long block is left for the end.
    query_block, head_pack, seq = (
        tl.num_programs(0) - 1 - tl.program_id(0),
        tl.program_id(1),
        tl.program_id(2),
    )
    query_start = tl.load(cu_seqlens_q + seq)
    query_len = tl.load(cu_seqlens_q + seq + 1) - query_start
    if query_block * TOKENS >= query_len:
        return
    seq_len = tl.load(seq_lens + seq)
    offs_m = tl.arange(0, BLOCK_M)
    query_index = query_block * TOKENS + offs_m // PACKED_HEADS
    head = head_pack * PACKED_HEADS + offs_m % PACKED_HEADS
    offs_d = tl.arange(0, BLOCK_D)
    kv_column = head_pack * PACKED_HEADS // GROUP_SIZE * HEAD_DIM
    mask_m = (query_index < query_len) & (offs_m < TOKENS * PACKED_HEADS)
    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    token = (query_start + query_index).to(tl.int64)
    q = tl.load(
        query + (token * query_token_stride + head * query_head_stride)[:, None] + offs_d[None, :],
        mask=mask_q,
        other=0.0,
    )
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if sinks is not None:
        # A key without a value.
        m_i = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        l_i += 1.0
    position = seq_len - query_len + query_index
    first_position = seq_len - query_len + query_block * TOKENS
    stop = tl.minimum(first_position + TOKENS, seq_len)
    first = 0
    if starts is not None:
        first = tl.load(starts + seq)
    block_table = block_tables + seq.to(tl.int64) * block_table_stride
    if WINDOW > 0:
        masked_first = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    else:
        # Keys before it are seen by every query.
        masked_first = (first_position + 1) // BLOCK_N * BLOCK_N
        m_i, l_i, acc = _attend_keys(
            q, keys, values, block_table, query_start, seq_len, kv_column, position, first, masked_first, m_i, l_i, acc,
            scale, softcap, key_token_stride, value_token_stride,
            HEAD_DIM, PAGE_SIZE, WINDOW, SOFTCAP, PAGED, DESCRIBED, False, BLOCK_N, BLOCK_D, NUM_STAGES,
        )  # fmt: skip
    m_i, l_i, acc = _attend_keys(
        q, keys, values, block_table, query_start, seq_len, kv_column, position, masked_first, stop, m_i, l_i, acc,
        scale, softcap, key_token_stride, value_token_stride,
        HEAD_DIM, PAGE_SIZE, WINDOW, SOFTCAP, PAGED, DESCRIBED, True, BLOCK_N, BLOCK_D, NUM_STAGES,
    )  # fmt: skip
    out_ptrs = out + (token * NUM_HEADS + head)[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(out_ptrs, (acc / l_i[:, None]).to(out.dtype.element_ty), mask=mask_q)
    if lse is not None:
        tl.store(lse + token * NUM_HEADS + head, (m_i + tl.log2(l_i)) * 0.6931471805599453, mask=mask_m)


def prefill(
    query: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor | None, cu_seqlens_q: Tensor, seq_lens: Tensor,
    max_seqlen_q: int, layer: Layer, sinks: Tensor | None = None, out: Tensor | None = None,
    starts: Tensor | None = None, lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of packed sequences, over their pages or, without `block_tables`, over the prefill batch
    itself.

    Args:
        query: (tokens, query heads, head size), a head's numbers contiguous. keys, values: (pages, page size, kv
        heads, head size), or (tokens, kv heads, head size) without `block_tables`. block_tables: (sequences, pages)
        int32. cu_seqlens_q: (sequences + 1,) int32, where each sequence's queries begin. seq_lens: (sequences,)
            int32,
            each sequence's keys; its queries stand at the last of them. max_seqlen_q: queries of the longest sequence.
        sinks: (query heads,), logits without a value.
        out: (tokens, query heads, head size), contiguous, where the result goes if it is part of another.
        starts: (sequences,) int32, the first of each sequence's keys that are attended over, at the beginning of a
            page and no later than its first query; all of them without it.
        lse: (tokens, query heads) float32, contiguous, where the scores' log-sum-exp goes.

    Returns:
        (tokens, query heads, head size).
    """
    tokens, heads, head_dim = query.shape
    if out is None:
        out = torch.empty((tokens, heads, head_dim), dtype=query.dtype, device=query.device)
    if max_seqlen_q >= LONG_SEQLEN and starts is None and lse is None:
        page_size = None if block_tables is None else keys.shape[1]
        prefill_long = _hopper_kernel(layer, page_size, query.dtype, query.device)
        if prefill_long is not None:
            prefill_long(query, keys, values, block_tables, cu_seqlens_q, seq_lens, max_seqlen_q, layer, out)
            return out
    block_d = triton.next_power_of_2(head_dim)
    described = head_dim == block_d and is_describable(keys) and is_describable(values)
    tile = prefill_tile(
        head_dim,
        query.itemsize,
        shared_memory(query),
        max_seqlen_q,
        paged=block_tables is not None,
        described=described,
    )
    axis = 0 if block_tables is None else 1
    key_stride, value_stride = keys.stride(axis), values.stride(axis)
    page_size = 1 if block_tables is None else keys.shape[1]
    if described:
        keys, values = (
            TensorDescriptor.from_tensor(x.flatten(-2).flatten(0, -2), [tile.block_n, head_dim])
            for x in (keys, values)
        )
    group_size = heads // layer.kv_heads
    num_packed = packed_heads(group_size)
    grid = (triton.cdiv(max_seqlen_q, tile.block_m // num_packed), heads // num_packed, len(seq_lens))
    _prefill[grid](
        query, keys, values, sinks,
        seq_lens if block_tables is None else block_tables, cu_seqlens_q, seq_lens, starts, out, lse,
        layer.scale * (1.0 if layer.softcap else LOG2_E), layer.softcap or 0.0,
        query.stride(0), query.stride(1), key_stride, value_stride,
        0 if block_tables is None else block_tables.stride(0),
        NUM_HEADS=heads, GROUP_SIZE=group_size, PACKED_HEADS=num_packed, HEAD_DIM=head_dim, PAGE_SIZE=page_size,
        WINDOW=layer.window or 0, SOFTCAP=layer.softcap is not None, PAGED=block_tables is not None,
        DESCRIBED=described, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=block_d, NUM_STAGES=tile.num_stages,
        num_warps=tile.num_warps, maxnreg=tile.registers,
    )  # fmt: skip
    return out


NOTES: list[str] = []
"""What a user is to know of these kernels, once it is known."""


@functools.cache
def _hopper_kernel(
    layer: Layer, page_size: int | None, dtype: torch.dtype, device: torch.device
) -> Callable[..., None] | None:
    """The kernel for long prompts on a Hopper GPU, compiled, where there is one for such layers and pages.

    Gluon, which it is written in, changes from one version of Triton to the next. Where one does not compile it, long
    prompts have the kernel of all others, and `NOTES` say so.
    """
    if not (
        is_gpu(device)
        and torch.cuda.get_device_capability(device) == (9, 0)
        and layer.head_dim == 128
        and layer.query_heads // layer.kv_heads in (1, 2, 4, 8, 16)
        and (layer.window, layer.softcap, layer.sinks) == (None, None, False)
        and (page_size is None or page_size % 128 == 0)
    ):
        return None
    try:
        from batchrun.engine.paged.attention import prefill_hopper

        prefill_hopper.compile_for(layer, page_size, dtype, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        NOTES.append(
            f"prefills of long prompts take longer, since Triton {triton.__version__} does not compile the kernel that "
            f"is made for this GPU: {one_line(error)}"
        )
        return None
    return prefill_hopper.prefill_long


def packed_heads(group_size: int) -> int:
    """How many of a group's heads stand side by side in a prefill's block."""
    return max(heads for heads in range(1, _MAX_PACKED_HEADS + 1) if group_size % heads == 0)


def prefill_tile(
    head_dim: int, itemsize: int, memory: int, max_seqlen_q: int, paged: bool, described: bool
) -> Tile:
    """What a block of threads with `memory` bytes takes."""
    head_bytes = triton.next_power_of_2(head_dim) * itemsize
    if head_bytes <= 256 and memory >= LONG_MEMORY:
        if described:
            return DESCRIBED_TILE
        if max_seqlen_q >= LONG_SEQLEN:
            return LONG_TILES[paged]
    block_n, num_stages = fitting_blocks(PREFILL_BLOCKS, PREFILL_BLOCK_M, head_bytes, memory)
    return Tile(PREFILL_BLOCK_M, block_n, num_stages, PREFILL_WARPS)
