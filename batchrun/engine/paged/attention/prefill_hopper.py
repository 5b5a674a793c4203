"""Attention of long prompts on a Hopper GPU, in Gluon: FlashAttention-3 (Shah et al., 2024).

Of a block's three groups of warps one fetches keys and values by the GPU's tensor memory accelerator, and two compute,
64 queries each. While one block of keys is multiplied by its values, the probabilities of the next one are computed.
Triton's own pipeline does neither: a warp there waits for each product before it goes on.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from batchrun.engine.paged.attention.architecture import Layer
from batchrun.engine.paged.attention.online_softmax import LOG2_E

# Triton 3.6 has it under its older name.
_fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

HEAD_DIM = 128
# Queries of each of the two groups of warps that compute; keys in a block, and blocks in flight.
BLOCK_M, BLOCK_N, NUM_STAGES = 64, 128, 2
# Warps of a group that computes.
WARPS = 4


@gluon.jit
def _fetch_blocks(
    keys, values, tiles, barriers, block_table, query_start, column, blocks,
    PAGED: gl.constexpr, PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, NUM_STAGES: gl.constexpr,
):  # fmt: skip
    """Keys and values from the last block to the first, each as soon as there is room."""
    _, k_tiles, v_tiles = tiles
    k_full, k_free, v_full, v_free = barriers
    for i in range(blocks + 1):
        # Keys are wanted one block before values.
        if i < blocks:
            stage = i % NUM_STAGES
            row = _row(block_table, query_start, (blocks - 1 - i) * BLOCK_N, PAGED, PAGE_SIZE)
            mbarrier.wait(k_free.index(stage), (i // NUM_STAGES + 1) & 1)
            mbarrier.expect(k_full.index(stage), keys.block_type.nbytes)
            _fetch(keys, [row, column], k_full.index(stage), k_tiles.index(stage))
        if i > 0:
            stage = (i - 1) % NUM_STAGES
            row = _row(block_table, query_start, (blocks - i) * BLOCK_N, PAGED, PAGE_SIZE)
            mbarrier.wait(v_free.index(stage), ((i - 1) // NUM_STAGES + 1) & 1)
            mbarrier.expect(v_full.index(stage), values.block_type.nbytes)
            _fetch(values, [row, column], v_full.index(stage), v_tiles.index(stage))


@gluon.jit
def _row(block_table, query_start, start, PAGED: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Where a sequence's key is among all; a block's are one behind the other."""
    if PAGED:
        return gl.load(block_table + start // PAGE_SIZE) * PAGE_SIZE + start % PAGE_SIZE
    else:
        return query_start + start


@gluon.jit
def _probabilities(
    qk, m_i, l_i, scale, first_key, position, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """Of one more block, and what older ones are to be multiplied by. See `online_softmax.attend`."""
    if MASKED:
        offs_n = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        qk = gl.where(offs_n[None, :] <= position[:, None], qk, float("-inf"))
    m_new = gl.maximum(m_i, gl.max(qk, axis=1) * scale)
    m_safe = m_new
    if MASKED:
        m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = gl.exp2(m_i - m_safe)
    p = gl.exp2(qk * scale - m_safe[:, None])
    return p, alpha, m_new, l_i * alpha + gl.sum(p, axis=1)


@gluon.jit
def _attend(
    first, stop, tiles, barriers, p, m_i, l_i, acc, scale, position, blocks,
    BLOCK_N: gl.constexpr, NUM_STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Blocks `first` to `stop`, counted from the last one: scores and probabilities of each, and what the one before
    adds to the result."""
    q_tile, k_tiles, v_tiles = tiles
    k_full, k_free, v_full, v_free = barriers
    LAYOUT: gl.constexpr = acc.type.layout
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    for i in range(first, stop):
        stage, last = i % NUM_STAGES, (i - 1) % NUM_STAGES
        scores = warpgroup_mma(
            q_tile,
            k_tiles.index(stage).permute((1, 0)),
            gl.zeros_like(p),
            use_acc=False,
            is_async=True,
        )
        mbarrier.wait(v_full.index(last), ((i - 1) // NUM_STAGES) & 1)
        weights = gl.convert_layout(p.to(q_tile.dtype), OPERAND)
        sums = warpgroup_mma(weights, v_tiles.index(last), acc, is_async=True)
        qk = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        first_key = (blocks - 1 - i) * BLOCK_N
        p, alpha, m_i, l_i = _probabilities(qk, m_i, l_i, scale, first_key, position, LAYOUT, BLOCK_N, MASKED)
        # The next keys are waited for here, since the compiler would else move the wait for the product with values
        # to before the probabilities. It moves none past a wait for memory.
        mbarrier.wait(k_full.index((i + 1) % NUM_STAGES), ((i + 1) // NUM_STAGES) & 1, pred=i + 1 < blocks)
        acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])
        mbarrier.arrive(v_free.index(last), count=1)
        acc = acc * alpha[:, None]
    return p, m_i, l_i, acc


@gluon.jit
def _clear(tile, stop, LAYOUT: gl.constexpr):
    """What is not the sequence's counts nothing, not even if it is no number."""
    x = tile.load(LAYOUT)
    rows = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    tile.store(gl.where((rows < stop)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()


@gluon.jit
def _attend_queries(
    PART: gl.constexpr, query, out, tiles, barriers, query_start, query_len, seq_len, query_block, head_pack, blocks,
    scale, query_token_stride, query_head_stride,
    NUM_HEADS: gl.constexpr, PACKED_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, NUM_STAGES: gl.constexpr,
):  # fmt: skip
    """One of the two halves of a block's queries."""
    q_tiles, k_tiles, v_tiles = tiles
    k_full, k_free, v_full, _ = barriers
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    first_query = (2 * query_block + PART) * (BLOCK_M // PACKED_HEADS)

    # As in `prefill._prefill`, heads of a group stand side by side.
    offs_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, ROWS))
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ROWS))
    query_index = first_query + offs_m // PACKED_HEADS
    head = head_pack * PACKED_HEADS + offs_m % PACKED_HEADS
    places = (query_start + query_index).to(gl.int64) * query_token_stride + head * query_head_stride
    mask_q = (query_index < query_len)[:, None]
    q_tile = q_tiles.index(PART)
    q_tile.store(gl.load(query + places[:, None] + offs_d[None, :], mask=mask_q, other=0.0))
    fence_async_shared()

    offs_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    query_index = first_query + offs_m // PACKED_HEADS
    position = seq_len - query_len + query_index
    m_i = gl.full((BLOCK_M,), float("-inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
    l_i = gl.zeros((BLOCK_M,), gl.float32, gl.SliceLayout(1, LAYOUT))
    acc = gl.zeros((BLOCK_M, HEAD_DIM), gl.float32, LAYOUT)

    # The last block of keys, alone.
    mbarrier.wait(k_full.index(0), 0)
    qk = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), acc, use_acc=False, is_async=True)
    qk = warpgroup_mma_wait(0, deps=[qk])
    mbarrier.arrive(k_free.index(0), count=1)
    first_key = (blocks - 1) * BLOCK_N
    p, _, m_i, l_i = _probabilities(qk, m_i, l_i, scale, first_key, position, LAYOUT, BLOCK_N, True)
    if blocks * BLOCK_N > seq_len:
        mbarrier.wait(v_full.index(0), 0)
        _clear(v_tiles.index(0), seq_len - first_key, ROWS)
    mbarrier.wait(k_full.index(1), 0, pred=blocks > 1)

    # Keys of this many blocks are seen by every query.
    unmasked = (seq_len - query_len + first_query + 1) // BLOCK_N
    masked = gl.maximum(blocks - unmasked, 1)
    own = (q_tile, k_tiles, v_tiles)
    p, m_i, l_i, acc = _attend(
        1, masked, own, barriers, p, m_i, l_i, acc, scale, position, blocks, BLOCK_N, NUM_STAGES, True
    )
    p, m_i, l_i, acc = _attend(
        masked, blocks, own, barriers, p, m_i, l_i, acc, scale, position, blocks, BLOCK_N, NUM_STAGES, False
    )
    last = (blocks - 1) % NUM_STAGES
    mbarrier.wait(v_full.index(last), ((blocks - 1) // NUM_STAGES) & 1)
    weights = gl.convert_layout(p.to(q_tile.dtype), OPERAND)
    acc = warpgroup_mma(weights, v_tiles.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])

    head = head_pack * PACKED_HEADS + offs_m % PACKED_HEADS
    places = ((query_start + query_index).to(gl.int64) * NUM_HEADS + head) * HEAD_DIM
    acc = (acc * (1.0 / l_i)[:, None]).to(out.dtype.element_ty)
    gl.store(out + places[:, None] + offs_d[None, :], acc, mask=(query_index < query_len)[:, None])


@gluon.jit(
    do_not_specialize=["block_table_stride"],
    do_not_specialize_on_alignment=["block_tables", "cu_seqlens_q", "seq_lens"],
)
def _prefill_long(
    query, keys, values, block_tables, cu_seqlens_q, seq_lens, out, scale,
    query_token_stride, query_head_stride, block_table_stride,
    NUM_HEADS: gl.constexpr, GROUP_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr,
    PAGED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, NUM_STAGES: gl.constexpr,
):  # fmt: skip
    PACKED_HEADS: gl.constexpr = GROUP_SIZE
    TOKENS: gl.constexpr = 2 * BLOCK_M // PACKED_HEADS
    query_block, head_pack, seq = (
        gl.num_programs(0) - 1 - gl.program_id(0),
        gl.program_id(1),
        gl.program_id(2),
    )
    query_start = gl.load(cu_seqlens_q + seq)
    query_len = gl.load(cu_seqlens_q + seq + 1) - query_start
    if query_block * TOKENS < query_len:
        seq_len = gl.load(seq_lens + seq)
        blocks = gl.cdiv(gl.minimum(seq_len - query_len + (query_block + 1) * TOKENS, seq_len), BLOCK_N)
        dtype: gl.constexpr = keys.dtype
        q_tiles = gl.allocate_shared_memory(dtype, [2, BLOCK_M, HEAD_DIM], keys.layout)
        k_tiles = gl.allocate_shared_memory(dtype, [NUM_STAGES, BLOCK_N, HEAD_DIM], keys.layout)
        v_tiles = gl.allocate_shared_memory(dtype, [NUM_STAGES, BLOCK_N, HEAD_DIM], keys.layout)
        k_full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
        k_free = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
        v_full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
        v_free = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(NUM_STAGES):
            mbarrier.init(k_full.index(stage), count=1)
            mbarrier.init(k_free.index(stage), count=2)
            mbarrier.init(v_full.index(stage), count=1)
            mbarrier.init(v_free.index(stage), count=2)
        fence_async_shared()
        tiles, barriers = (q_tiles, k_tiles, v_tiles), (k_full, k_free, v_full, v_free)
        block_table = block_tables + seq.to(gl.int64) * block_table_stride
        column = head_pack * HEAD_DIM
        gl.warp_specialize(
            [
                (_attend_queries, (
                    0, query, out, tiles, barriers, query_start, query_len, seq_len, query_block, head_pack, blocks,
                    scale, query_token_stride, query_head_stride,
                    NUM_HEADS, PACKED_HEADS, HEAD_DIM, BLOCK_M, BLOCK_N, NUM_STAGES,
                )),
                (_attend_queries, (
                    1, query, out, tiles, barriers, query_start, query_len, seq_len, query_block, head_pack, blocks,
                    scale, query_token_stride, query_head_stride,
                    NUM_HEADS, PACKED_HEADS, HEAD_DIM, BLOCK_M, BLOCK_N, NUM_STAGES,
                )),
                (_fetch_blocks, (
                    keys, values, tiles, barriers, block_table, query_start, column, blocks,
                    PAGED, PAGE_SIZE, BLOCK_N, NUM_STAGES,
                )),
            ],
            # Warps of the second and third group, and registers of each of their threads: the first has what is left.
            [4, 1],
            [240, 24],
        )  # fmt: skip


def prefill_long(
    query: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor | None, cu_seqlens_q: Tensor, seq_lens: Tensor,
    max_seqlen_q: int, layer: Layer, out: Tensor, only_compile: bool = False,
) -> None:  # fmt: skip
    """As `prefill.prefill`, for layers without window, soft-capping and sinks."""
    heads, group_size = query.shape[1], query.shape[1] // layer.kv_heads
    page_size = 1 if block_tables is None else keys.shape[1]
    layout = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], getattr(gl, str(query.dtype)[6:]))
    keys, values = (
        TensorDescriptor.from_tensor(x.flatten(-2).flatten(0, -2), [BLOCK_N, HEAD_DIM], layout)
        for x in (keys, values)
    )
    grid = (triton.cdiv(max_seqlen_q, 2 * BLOCK_M // group_size), layer.kv_heads, len(seq_lens))
    _prefill_long.run(
        query, keys, values, seq_lens if block_tables is None else block_tables, cu_seqlens_q, seq_lens, out,
        layer.scale * LOG2_E,
        query.stride(0), query.stride(1), 0 if block_tables is None else block_tables.stride(0),
        NUM_HEADS=heads, GROUP_SIZE=group_size, HEAD_DIM=HEAD_DIM, PAGE_SIZE=page_size,
        PAGED=block_tables is not None, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, NUM_STAGES=NUM_STAGES, num_warps=WARPS,
        grid=grid, warmup=only_compile,
    )  # fmt: skip


def compile_for(layer: Layer, page_size: int | None, dtype: torch.dtype, device: torch.device) -> None:
    """Compiles what `prefill_long` needs for such layers, over pages or, without `page_size`, without them.

    Raises:
        Exception: of Triton's, any; this version does not compile it.
    """
    tokens = (1,) if page_size is None else (1, page_size)
    query = torch.empty(1, layer.query_heads, HEAD_DIM, dtype=dtype, device=device)
    keys = torch.empty(*tokens, layer.kv_heads, HEAD_DIM, dtype=dtype, device=device)
    ints = torch.zeros(2, dtype=torch.int32, device=device)
    tables = None if page_size is None else ints[None]
    prefill_long(query, keys, keys, tables, ints, ints[1:], 1, layer, query, only_compile=True)
