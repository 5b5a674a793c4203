"""Attention over pages on a GPU, in Triton: FlashAttention-2's blocks of keys into a running softmax (Dao, 2023)."""

# mypy: disable-error-code="no-untyped-def, attr-defined, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchrun.engine.paged.architecture import Layer

_LOG2_E = 1.4426950408889634
_MOST_PACKED = 16
# Numbers and addresses that differ from call to call and make no code faster are not compiled for: each variant would
# cost a run that meets it first about two seconds.

# Keys in a block and blocks in flight, best first.
DECODE_BLOCKS = ((128, 2), (64, 2), (32, 2), (16, 1))
SPLIT_BLOCKS = ((64, 3), (64, 2), (32, 2), (16, 1))
PREFILL_BLOCKS = ((64, 3), (64, 2), (32, 2), (16, 1))
# Queries in a block of threads, and its warps.
QUERIES, WARPS = 64, 4

LONG_ROW, LONG_QUERIES, LONG_BLOCK, LONG_WARPS, LONG_MEMORY = 2048, 128, 128, 8, 232448
"""Packs with a row of so many tokens take larger blocks, where one may have so many bytes of shared memory (Hopper). On
an H100, two rows of 8,000 and 16 query heads: 489 instead of 449 TFLOP/s; a continued row, over its pages, 462
instead of 401. Rows of 600 would lose a fifth."""

_FULL_BLOCKS = 1024
"""Blocks of threads from which a decode step is not split any further. On an H100, 60 rows of about 8,000 tokens and 8
key heads: 2.95 TB/s split, 2.59 not; 16 rows 2.71 and 1.62; 4 rows 1.86 and 0.68; 128 rows of 1,500 the same."""


@triton.jit
def _capped(score, scale, softcap):
    """A tanh of what the GPU has an instruction for, in powers of two."""
    bent = 2.0 / (1.0 + tl.exp2(-2.0 * 1.4426950408889634 * scale * score / softcap)) - 1.0
    return softcap * 1.4426950408889634 * bent


@triton.jit
def _attend(q, k, v, seen, top, total, sums, scale, softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """One block of keys into a running softmax (Milakov and Gimelshein, 2018), in powers of two."""
    score = tl.dot(q, k)
    if SOFTCAP:
        score, scale = _capped(score, scale, softcap), 1.0
    if MASKED:
        score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, axis=1) * scale)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(top - base)
    weight = tl.exp2(score * scale - base[:, None])  # one instruction for both, since the scale comes last
    sums = tl.dot(weight.to(v.dtype), v, sums * shrink[:, None])
    return higher, total * shrink + tl.sum(weight, axis=1), sums


@triton.jit
def _first_key(length, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Where the blocks of keys begin that a row's last token sees."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // BLOCK * BLOCK
    return first


@triton.jit(
    do_not_specialize=["chunk", "table_row", "rows"],
    do_not_specialize_on_alignment=["places", "tables", "lengths"],
)
def _decode(
    query, key, value, keys, values, places, tables, lengths, out, lse, scale, softcap, chunk,
    query_row, query_head, key_row, value_row, table_row, rows,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    length = tl.load(lengths + row)
    first = _first_key(length, WINDOW, BLOCK)
    stop = length - 1
    part = tl.program_id(1)
    if SPLIT:
        first += part * chunk
        if (part > 0) & (first >= stop):
            return
        stop = tl.minimum(first + chunk, stop)
    member = tl.arange(0, MEMBERS)  # GROUP of them share a key
    column = tl.arange(0, COLUMNS)
    own = member < GROUP
    inside = column < SIZE
    long_row = row.to(tl.int64)
    asked = query + long_row * query_row + (head * GROUP + member[:, None]) * query_head + column[None, :]
    q = tl.load(asked, mask=own[:, None] & inside[None, :], other=0.0)
    top = tl.full((MEMBERS,), float("-inf"), tl.float32)
    total = tl.zeros((MEMBERS,), tl.float32)
    sums = tl.zeros((MEMBERS, COLUMNS), tl.float32)
    if part == 0:
        # The row's new token goes to its page and begins the softmax; nobody else reads or writes it in this step.
        own_key = tl.load(key + long_row * key_row + head * SIZE + column, mask=inside, other=0.0)
        own_value = tl.load(value + long_row * value_row + head * SIZE + column, mask=inside, other=0.0)
        new = (tl.load(places + row) * KV_HEADS + head) * SIZE + column
        tl.store(keys + new, own_key, mask=inside)
        tl.store(values + new, own_value, mask=inside)
        top = tl.sum(q.to(tl.float32) * own_key.to(tl.float32)[None, :], axis=1)
        top = _capped(top, scale, softcap) if SOFTCAP else top * scale
        total += 1.0
        sums += own_value.to(tl.float32)[None, :]
    for start in tl.range(first, stop, BLOCK, num_stages=STAGES):
        page = tl.load(tables + long_row * table_row + start // PAGE).to(tl.int64)
        token = start + tl.arange(0, BLOCK)
        seen = token < length - 1
        if WINDOW > 0:
            seen = seen & (token >= length - WINDOW)
        offset = ((page * PAGE + token % PAGE) * KV_HEADS + head) * SIZE
        k = tl.load(keys + offset[None, :] + column[:, None], mask=seen[None, :] & inside[:, None], other=0.0)
        v = tl.load(
            values + offset[:, None] + column[None, :], mask=seen[:, None] & inside[None, :], other=0.0
        )
        top, total, sums = _attend(q, k, v, seen[None, :], top, total, sums, scale, softcap, SOFTCAP, True)
    place = (part.to(tl.int64) * rows + long_row) * KV_HEADS * GROUP + head * GROUP + member
    written = own[:, None] & inside[None, :]
    tl.store(
        out + place[:, None] * SIZE + column[None, :],
        (sums / total[:, None]).to(out.dtype.element_ty),
        mask=written,
    )
    tl.store(lse + place, (top + tl.log2(total)) * 0.6931471805599453, mask=own)


def decode(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, places: Tensor, tables: Tensor,
    lengths: Tensor, layer: Layer,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes each row's new key and value to its pages as `write` does, and attends over the pages with its query.

    A block of threads for each row and key head; where those are too few to fill the device or too unlike, one for
    each chunk of a row's keys (Flash-Decoding: Dao et al., 2023).

    Args:
        query: (rows, query heads, head size), a head's numbers contiguous.
        key, value: (rows, kv heads, head size), each row's heads contiguous.
        keys, values: (pages, page size, kv heads, head size), contiguous.
        places: (rows,) int64, where the new ones go: the last of the row's tokens.
        tables: (rows, pages) int32. lengths: (rows,) int32, the new token included.

    Returns:
        (rows, query heads, head size), and the scores' log-sum-exp (rows, query heads) float32.
    """
    rows, heads, size = query.shape
    group = heads // layer.kv_heads
    members = matrix_rows(group)
    out = torch.empty((rows, heads, size), dtype=query.dtype, device=query.device)
    lse = torch.empty((rows, heads), dtype=torch.float32, device=query.device)
    chunk = _chunk(rows)
    seen = min(tables.shape[1] * keys.shape[1], layer.window or 1 << 30)
    parts = 1 if rows * layer.kv_heads >= _FULL_BLOCKS else triton.cdiv(seen, chunk)
    columns = triton.next_power_of_2(size)
    choices = DECODE_BLOCKS if parts == 1 else SPLIT_BLOCKS
    block, stages = fitting(choices, members, columns * query.itemsize, _shared_memory(query))
    if parts > 1:
        # A window's first block of keys begins before the window.
        parts = triton.cdiv(seen + block, chunk) if layer.window else parts
        part_out = torch.empty((parts, rows, heads, size), dtype=torch.float32, device=query.device)
        part_lse = torch.empty((parts, rows, heads), dtype=torch.float32, device=query.device)
    else:
        part_out, part_lse = out, lse
    _decode[(rows * layer.kv_heads, parts)](
        query, key, value, keys, values, places, tables, lengths, part_out, part_lse,
        layer.scale * (1.0 if layer.softcap else _LOG2_E), layer.softcap or 0.0, chunk,
        query.stride(0), query.stride(1), key.stride(0), value.stride(0), tables.stride(0), rows,
        KV_HEADS=layer.kv_heads, GROUP=group, MEMBERS=members, SIZE=size, PAGE=keys.shape[1],
        WINDOW=layer.window or 0, SOFTCAP=layer.softcap is not None,
        BLOCK=block, COLUMNS=columns, STAGES=stages, SPLIT=parts > 1, num_warps=4,
    )  # fmt: skip
    if parts > 1:
        _combine[(rows, heads)](
            part_out, part_lse, lengths, out, lse, chunk, rows,
            HEADS=heads, SIZE=size, COLUMNS=columns, WINDOW=layer.window or 0, BLOCK=block, num_warps=1,
        )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["chunk", "rows"], do_not_specialize_on_alignment=["lengths"])
def _combine(
    part_out, part_lse, lengths, out, lse, chunk, rows,
    HEADS: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row)
    parts = tl.maximum(tl.cdiv(length - 1 - _first_key(length, WINDOW, BLOCK), chunk), 1)
    column = tl.arange(0, COLUMNS)
    inside = column < SIZE
    own = row.to(tl.int64) * HEADS + head
    top, total, sums = float("-inf"), 0.0, tl.zeros((COLUMNS,), tl.float32)
    for part in range(0, parts):
        place = own + part * rows * HEADS
        other = tl.load(part_lse + place)
        values = tl.load(part_out + place * SIZE + column, mask=inside, other=0.0)
        higher = tl.maximum(top, other)
        shrink, weight = tl.exp(top - higher), tl.exp(other - higher)
        top, total, sums = higher, total * shrink + weight, sums * shrink + values * weight
    tl.store(out + own * SIZE + column, (sums / total).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + own, top + tl.log(total))


@triton.jit(do_not_specialize=["table_row"], do_not_specialize_on_alignment=["tables", "starts", "lengths"])
def _prefill(
    query, keys, values, tables, starts, lengths, out, scale, softcap,
    query_token, query_head, key_token, value_token, table_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PAGED: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # PACK heads of a group, which have their keys in common, fill a block's queries: it then spans fewer tokens, and
    # less of it is lost at a row's end and to keys that are too late.
    TOKENS: tl.constexpr = QUERIES // PACK
    # The last queries of a row see most keys: they go first, so that no long block is left for the end.
    block, pack, row = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(starts + row)
    count = tl.load(starts + row + 1) - begin
    if block * TOKENS >= count:
        return
    length = tl.load(lengths + row)
    number = tl.arange(0, QUERIES)
    member = block * TOKENS + number // PACK
    head = pack * PACK + number % PACK
    column = tl.arange(0, COLUMNS)
    inside = column < SIZE
    part = pack * PACK // GROUP * SIZE + column
    own = ((member < count) & (number < TOKENS * PACK))[:, None] & inside[None, :]
    token = (begin + member).to(tl.int64)
    q = tl.load(
        query + (token * query_token + head * query_head)[:, None] + column[None, :], mask=own, other=0.0
    )
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, COLUMNS), tl.float32)
    place = length - count + member
    earliest = length - count + block * TOKENS
    first = 0
    if WINDOW > 0:
        first = tl.maximum(earliest - WINDOW + 1, 0) // BLOCK * BLOCK
        whole = first
    else:
        whole = (earliest + 1) // BLOCK * BLOCK  # keys before it are seen by every query
    for start in tl.range(first, whole, BLOCK, num_stages=STAGES):
        other = start + tl.arange(0, BLOCK)
        if PAGED:
            page = tl.load(tables + row.to(tl.int64) * table_row + start // PAGE).to(tl.int64)
            source = page * PAGE + other % PAGE
        else:
            source = (begin + other).to(tl.int64)
        k = tl.load(keys + (source * key_token)[None, :] + part[:, None], mask=inside[:, None], other=0.0)
        v = tl.load(values + (source * value_token)[:, None] + part[None, :], mask=inside[None, :], other=0.0)
        top, total, sums = _attend(q, k, v, other[None, :], top, total, sums, scale, softcap, SOFTCAP, False)
    for start in tl.range(whole, tl.minimum(earliest + TOKENS, length), BLOCK, num_stages=STAGES):
        other = start + tl.arange(0, BLOCK)
        there = other < length
        if PAGED:
            page = tl.load(tables + row.to(tl.int64) * table_row + start // PAGE).to(tl.int64)
            source = page * PAGE + other % PAGE
        else:
            source = (begin + other).to(tl.int64)
        k = tl.load(
            keys + (source * key_token)[None, :] + part[:, None],
            mask=there[None, :] & inside[:, None],
            other=0.0,
        )
        v = tl.load(
            values + (source * value_token)[:, None] + part[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        seen = other[None, :] <= place[:, None]
        if WINDOW > 0:
            seen = seen & (other[None, :] > place[:, None] - WINDOW)
        top, total, sums = _attend(q, k, v, seen, top, total, sums, scale, softcap, SOFTCAP, True)
    target = out + (token * HEADS + head)[:, None] * SIZE + column[None, :]
    tl.store(target, (sums / total[:, None]).to(out.dtype.element_ty), mask=own)


def prefill(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor | None, starts: Tensor, lengths: Tensor,
    longest_query: int, layer: Layer,
) -> Tensor:  # fmt: skip
    """Causal attention of packed rows, over their pages or, without `tables`, over the pack itself.

    Args:
        query: (tokens, query heads, head size), a head's numbers contiguous.
        keys, values: (pages, page size, kv heads, head size), or (tokens, kv heads, head size) without `tables`.
        tables: (rows, pages) int32. starts: (rows + 1,) int32, where each row's queries begin. lengths: (rows,)
            int32, each row's keys; its queries stand at the last of them. longest_query: of any row.

    Returns:
        (tokens, query heads, head size).
    """
    tokens, heads, size = query.shape
    out = torch.empty((tokens, heads, size), dtype=query.dtype, device=query.device)
    columns = triton.next_power_of_2(size)
    queries, block, stages, warps = prefill_tile(
        size, query.itemsize, _shared_memory(query), longest_query, paged=tables is not None
    )
    axis = 0 if tables is None else 1
    group = heads // layer.kv_heads
    pack = packed_heads(group)
    grid = (triton.cdiv(longest_query, queries // pack), heads // pack, len(lengths))
    _prefill[grid](
        query, keys, values, lengths if tables is None else tables, starts, lengths, out,
        layer.scale * (1.0 if layer.softcap else _LOG2_E), layer.softcap or 0.0,
        query.stride(0), query.stride(1), keys.stride(axis), values.stride(axis),
        0 if tables is None else tables.stride(0),
        HEADS=heads, GROUP=group, PACK=pack, SIZE=size, PAGE=1 if tables is None else keys.shape[1],
        WINDOW=layer.window or 0, SOFTCAP=layer.softcap is not None, PAGED=tables is not None,
        QUERIES=queries, BLOCK=block, COLUMNS=columns, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out


def matrix_rows(group: int) -> int:
    """Rows that a group's heads take in a decode step's products; a matrix unit takes 16 at least."""
    return int(max(16, triton.next_power_of_2(group)))


def packed_heads(group: int) -> int:
    """How many of a group's heads stand side by side in a prefill's block."""
    return max(heads for heads in range(1, _MOST_PACKED + 1) if group % heads == 0)


def prefill_tile(
    head_dim: int, itemsize: int, memory: int, longest_query: int, paged: bool
) -> tuple[int, int, int, int]:
    """Queries and keys in a block, blocks in flight, and warps, with `memory` bytes for a block."""
    head_bytes = triton.next_power_of_2(head_dim) * itemsize
    if longest_query >= LONG_ROW and head_bytes <= 256 and memory >= LONG_MEMORY:
        return LONG_QUERIES, LONG_BLOCK, 2 if paged else 3, LONG_WARPS
    return QUERIES, *fitting(PREFILL_BLOCKS, QUERIES, head_bytes, memory), WARPS


def _chunk(rows: int) -> int:
    """Keys of a row for one block of threads of a split decode step: few rows are cut finer."""
    return 1024 if rows >= 16 else 512


def _shared_memory(x: Tensor) -> int:
    """Bytes that a block of threads may have."""
    if not x.is_cuda:  # Triton's interpreter
        return 0
    device: Any = torch.cuda.get_device_properties(x.device)
    return int(getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block))


def fitting(
    choices: tuple[tuple[int, int], ...], queries: int, head_bytes: int, memory: int
) -> tuple[int, int]:
    """The first choice that leaves a quarter of the shared memory free, or the last one. Sizes in bytes."""
    for block, stages in choices:
        if (queries + 2 * block * stages) * head_bytes <= 0.75 * memory:
            return block, stages
    return choices[-1]
