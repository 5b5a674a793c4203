"""The engine's own GPU kernels, in Triton: attention over pages, and the small ones that no library has.

The attention is FlashAttention-2's (Dao, 2023): blocks of keys into a running softmax.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchrun.engine.paged.architecture import Layer

_LOG2_E = 1.4426950408889634
_QUERIES, _MOST_PACKED = 64, 16
# Keys in a block and blocks in flight, best first.
DECODE_BLOCKS = ((128, 2), (64, 2), (32, 2), (16, 1))
PREFILL_BLOCKS = ((64, 3), (64, 2), (32, 2), (16, 1))


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
def _decode(
    query, key, value, keys, values, places, tables, lengths, out, lse, scale, softcap,
    query_row, query_head, key_row, value_row, table_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    length = tl.load(lengths + row)
    member = tl.arange(0, MEMBERS)  # GROUP of them share a key
    column = tl.arange(0, COLUMNS)
    own = member < GROUP
    inside = column < SIZE
    long_row = row.to(tl.int64)
    asked = query + long_row * query_row + (head * GROUP + member[:, None]) * query_head + column[None, :]
    q = tl.load(asked, mask=own[:, None] & inside[None, :], other=0.0)
    # The row's new token goes to its page and begins the softmax; nobody else reads or writes it in this step.
    own_key = tl.load(key + long_row * key_row + head * SIZE + column, mask=inside, other=0.0)
    own_value = tl.load(value + long_row * value_row + head * SIZE + column, mask=inside, other=0.0)
    new = (tl.load(places + row) * KV_HEADS + head) * SIZE + column
    tl.store(keys + new, own_key, mask=inside)
    tl.store(values + new, own_value, mask=inside)
    top = tl.sum(q.to(tl.float32) * own_key.to(tl.float32)[None, :], axis=1)
    top = _capped(top, scale, softcap) if SOFTCAP else top * scale
    total = tl.full((MEMBERS,), 1.0, tl.float32)
    sums = tl.zeros((MEMBERS, COLUMNS), tl.float32) + own_value.to(tl.float32)[None, :]
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // BLOCK * BLOCK
    for start in tl.range(first, length - 1, BLOCK, num_stages=STAGES):
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
    place = long_row * KV_HEADS * GROUP + head * GROUP + member
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

    A block of threads for each row and key head.

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
    out = torch.empty((rows, heads, size), dtype=query.dtype, device=query.device)
    lse = torch.empty((rows, heads), dtype=torch.float32, device=query.device)
    columns = triton.next_power_of_2(size)
    group = heads // layer.kv_heads
    members = matrix_rows(group)
    block, stages = _blocks(DECODE_BLOCKS, query, members)
    _decode[(rows * layer.kv_heads,)](
        query, key, value, keys, values, places, tables, lengths, out, lse,
        layer.scale * (1.0 if layer.softcap else _LOG2_E), layer.softcap or 0.0,
        query.stride(0), query.stride(1), key.stride(0), value.stride(0), tables.stride(0),
        KV_HEADS=layer.kv_heads, GROUP=group, MEMBERS=members, SIZE=size, PAGE=keys.shape[1],
        WINDOW=layer.window or 0, SOFTCAP=layer.softcap is not None,
        BLOCK=block, COLUMNS=columns, STAGES=stages, num_warps=4,
    )  # fmt: skip
    return out, lse


@triton.jit
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
    block, stages = _blocks(PREFILL_BLOCKS, query, _QUERIES)
    axis = 0 if tables is None else 1
    group = heads // layer.kv_heads
    pack = packed_heads(group)
    grid = (triton.cdiv(longest_query, _QUERIES // pack), heads // pack, len(lengths))
    _prefill[grid](
        query, keys, values, lengths if tables is None else tables, starts, lengths, out,
        layer.scale * (1.0 if layer.softcap else _LOG2_E), layer.softcap or 0.0,
        query.stride(0), query.stride(1), keys.stride(axis), values.stride(axis),
        0 if tables is None else tables.stride(0),
        HEADS=heads, GROUP=group, PACK=pack, SIZE=size, PAGE=1 if tables is None else keys.shape[1],
        WINDOW=layer.window or 0, SOFTCAP=layer.softcap is not None, PAGED=tables is not None,
        QUERIES=_QUERIES, BLOCK=block, COLUMNS=columns, STAGES=stages, num_warps=4,
    )  # fmt: skip
    return out


def matrix_rows(group: int) -> int:
    """Rows that a group's heads take in a decode step's products; a matrix unit takes 16 at least."""
    return int(max(16, triton.next_power_of_2(group)))


def packed_heads(group: int) -> int:
    """How many of a group's heads stand side by side in a prefill's block."""
    return max(heads for heads in range(1, _MOST_PACKED + 1) if group % heads == 0)


def _blocks(choices: tuple[tuple[int, int], ...], query: Tensor, queries: int) -> tuple[int, int]:
    if not query.is_cuda:  # Triton's interpreter
        return choices[-1]
    device: Any = torch.cuda.get_device_properties(query.device)
    memory = getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block)
    return fitting(choices, queries, triton.next_power_of_2(query.shape[2]) * query.itemsize, memory)


def fitting(
    choices: tuple[tuple[int, int], ...], queries: int, head_bytes: int, memory: int
) -> tuple[int, int]:
    """The first choice that leaves a quarter of the shared memory free, or the last one. Sizes in bytes."""
    for block, stages in choices:
        if (queries + 2 * block * stages) * head_bytes <= 0.75 * memory:
            return block, stages
    return choices[-1]
