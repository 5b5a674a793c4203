"""Pairs of token and expert in the experts' order, sorted on a GPU in Triton; nothing is read back by the host."""

# mypy: disable-error-code="no-untyped-def, attr-defined, untyped-decorator, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK_NUMBERS, _MAX_CHUNK = 16384, 128
"""Numbers that a block of threads compares at once, and pairs of a chunk at most."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Pairs in the order of their experts, the tokens of each in their own order, and the tiles of rows over them.

    Attributes:
        order: (pairs,) int32, the pairs (token * experts per token + number) one expert after the other. Pairs of
            experts that are not here are left out, and what is behind the last one is undefined.
        tiles: (3, tiles) int32: a tile's expert, its first place in `order`, and where the expert's places end. Tiles
            that are not needed are the last, and begin where they end.
        needed: (1,) int32, tiles that are needed.
    """

    order: Tensor
    tiles: Tensor
    needed: Tensor


@triton.jit(do_not_specialize=["pairs", "chunks"])
def _count(expert_ids, counts, pairs, chunks, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(expert_ids + pair, mask=pair < pairs, other=-1).to(tl.int32)
    experts = tl.arange(0, EXPERTS)
    found = tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), axis=0)
    tl.store(counts + experts * chunks + chunk, found)


@triton.jit(do_not_specialize=["chunks"])
def _scan(counts, totals, chunks, BLOCK: tl.constexpr):
    # A block of threads for each expert: its counts become the numbers of its pairs in earlier chunks.
    expert = tl.program_id(0)
    total = 0
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        place = counts + expert * chunks + chunk
        found = tl.load(place, mask=chunk < chunks, other=0)
        tl.store(place, tl.cumsum(found, axis=0) - found + total, mask=chunk < chunks)
        total += tl.sum(found, axis=0)
    tl.store(totals + expert, total)


@triton.jit(do_not_specialize=["pairs", "chunks", "num_experts", "num_tiles"])
def _place(
    expert_ids, counts, totals, order, tiles, tiles_needed, pairs, chunks, num_experts, num_tiles,
    EXPERTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    program, number, experts = tl.program_id(0), tl.arange(0, CHUNK), tl.arange(0, EXPERTS)
    here = experts < num_experts
    total = tl.load(totals + experts, mask=here, other=0)
    end = tl.cumsum(total, axis=0)
    begin = end - total
    if program < chunks:
        pair = program * CHUNK + number
        expert = tl.load(expert_ids + pair, mask=pair < pairs, other=-1).to(tl.int32)
        mask = (expert >= 0) & (expert < num_experts)
        place = tl.load(counts + expert * chunks + program, mask=mask, other=0)
        earlier = (expert[:, None] == expert[None, :]) & (number[None, :] < number[:, None])
        place += tl.sum(earlier.to(tl.int32), axis=1)
        place += tl.gather(begin, tl.where(mask, expert, 0), 0)
        tl.store(order + place, pair, mask=mask)
    tile = program * CHUNK + number
    if program * CHUNK < num_tiles:
        needed = (total + BLOCK_M - 1) // BLOCK_M
        tile_end = tl.cumsum(needed, axis=0)
        expert = tl.sum((tile_end[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        found = expert < num_experts
        expert = tl.where(found, expert, 0)
        row = tl.gather(begin - (tile_end - needed) * BLOCK_M, expert, 0) + tile * BLOCK_M
        mask = tile < num_tiles
        tl.store(tiles + tile, expert, mask=mask)
        tl.store(tiles + num_tiles + tile, tl.where(found, row, 0), mask=mask)
        tl.store(tiles + 2 * num_tiles + tile, tl.where(found, tl.gather(end, expert, 0), 0), mask=mask)
        if program == 0:
            tl.store(tiles_needed, tl.sum(needed, axis=0))


def group_by_expert(expert_ids: Tensor, experts: int, tile_rows: int) -> Groups:
    """A stable counting sort, in three kernels.

    Args:
        expert_ids: (tokens, experts per token) integers, contiguous; pairs of others than 0 to `experts` - 1 are left
            out.
        tile_rows: rows of a tile.
    """
    pairs, device = expert_ids.numel(), expert_ids.device
    padded = triton.next_power_of_2(experts)
    chunk = min(_MAX_CHUNK, max(16, _CHUNK_NUMBERS // padded))
    chunks = triton.cdiv(pairs, chunk)
    counts = torch.empty((padded, chunks), dtype=torch.int32, device=device)
    totals = torch.empty(padded, dtype=torch.int32, device=device)
    num_tiles = pairs // tile_rows + min(experts, pairs)
    groups = Groups(
        torch.empty(pairs, dtype=torch.int32, device=device),
        torch.empty((3, num_tiles), dtype=torch.int32, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
    )
    _count[(chunks,)](expert_ids, counts, pairs, chunks, EXPERTS=padded, CHUNK=chunk, num_warps=4)
    _scan[(padded,)](counts, totals, chunks, BLOCK=256, num_warps=1)
    _place[(max(chunks, triton.cdiv(num_tiles, chunk)),)](
        expert_ids, counts, totals, groups.order, groups.tiles, groups.needed, pairs, chunks, experts, num_tiles,
        EXPERTS=padded, CHUNK=chunk, BLOCK_M=tile_rows, num_warps=4,
    )  # fmt: skip
    return groups
