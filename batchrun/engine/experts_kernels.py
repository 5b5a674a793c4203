"""The experts of a layer on a GPU, in Triton: pairs of token and expert in the experts' order, and grouped products.

A grouped product multiplies each expert's rows with that expert's weights, all in one kernel: tiles of rows never mix
experts (as in MegaBlocks; Gale et al., 2022). Nothing is read back by the host, nothing is added up in an order that
depends on timing, and what becomes of a row does not depend on the others.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, untyped-decorator, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchrun.engine.fp8 import FP8, FP8_MAX

_CHUNK_NUMBERS, _MAX_CHUNK = 16384, 128
"""Numbers that a block of threads compares at once, and pairs of a chunk at most."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One block's part of a grouped product: rows, columns of the weights, features at a time; its warps and stages.

    `swapped` multiplies the weights with the rows: matrix units want 64 of the first and take 8 or more of the second.
    """

    rows: int
    columns: int
    features: int
    warps: int
    stages: int
    swapped: bool


_TILES = (
    (16, Tile(16, 128, 128, 4, 3, True)),
    (48, Tile(64, 256, 64, 8, 4, False)),
    (1 << 62, Tile(128, 256, 64, 8, 4, False)),
)
"""The best of many for up to so many rows of an expert in the mean, features as of 16 bits. Few of them, since each is
compiled when it is first wanted."""

_FLOAT32 = Tile(64, 64, 32, 4, 2, False)
"""Without matrix units, a large tile would take minutes to compile."""


def tile_for(pairs: int, experts: int, dtype: torch.dtype, memory: int) -> Tile:
    """The tile of both products of weights of a dtype, where a block of threads has so many bytes of shared memory."""
    if dtype.itemsize == 4:
        return _FLOAT32
    tile = next(tile for most, tile in _TILES if pairs <= most * experts)

    def taken() -> int:
        return tile.stages * (tile.rows + tile.columns) * 2 * tile.features

    while taken() > memory and tile.stages > 2:
        tile = replace(tile, stages=tile.stages - 1)
    while taken() > memory and tile.columns > 32:
        tile = replace(tile, columns=tile.columns // 2)
    return replace(tile, features=tile.features * 2 // dtype.itemsize)


def shared_memory(device: torch.device) -> int:
    """Bytes that a block of threads may have; what Triton's interpreter runs in has no end."""
    if device.type != "cuda":
        return 1 << 30
    properties: Any = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


@dataclass(frozen=True, slots=True)
class Groups:
    """Pairs in the order of their experts, the tokens of each in their own order, and the tiles of rows over them.

    Attributes:
        order: (pairs,) int32, the pairs (token * experts per token + number) one expert after the other. Pairs of
            experts that are not here are left out, and what is behind the last one is undefined.
        tiles: (3, tiles) int32: a tile's expert, its first place in `order`, and where the expert's places end. Tiles
            that are not needed begin where they end.
    """

    order: Tensor
    tiles: Tensor


@triton.jit
def _route(
    logits, weights, expert_ids, num_experts,
    EXPERTS: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, AMONG_CHOSEN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    experts, numbers = tl.arange(0, EXPERTS), tl.arange(0, BLOCK)
    x = tl.load(logits + token * num_experts + experts, mask=experts < num_experts, other=float("-inf"))
    x = x.to(tl.float32)
    top = tl.max(x, axis=0)
    total = tl.sum(tl.exp(x - top), axis=0)
    weight, chosen = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for number in range(PER_TOKEN):
        best = tl.max(x, axis=0)
        expert = tl.min(tl.where(x == best, experts, num_experts - 1), axis=0)
        weight = tl.where(numbers == number, tl.exp(best - top), weight)
        chosen = tl.where(numbers == number, expert, chosen)
        x = tl.where(experts == expert, float("-inf"), x)
    # Of logits that are no numbers come weights that are none, whichever were chosen.
    weight = weight / tl.sum(weight, axis=0) + 0.0 * total if AMONG_CHOSEN else weight / total
    place = token * PER_TOKEN + numbers
    tl.store(weights + place, weight, mask=numbers < PER_TOKEN)
    tl.store(expert_ids + place, chosen, mask=numbers < PER_TOKEN)


def route(logits: Tensor, per_token: int, among_chosen: bool) -> tuple[Tensor, Tensor]:
    """Each token's experts of the largest logits, the first of equals, and their softmax: over all experts or
    `among_chosen`.

    Args:
        logits: (tokens, experts), contiguous.

    Returns:
        (tokens, per_token) float32, the largest first, and the experts, int32.
    """
    tokens, experts = logits.shape
    weights = torch.empty((tokens, per_token), dtype=torch.float32, device=logits.device)
    expert_ids = torch.empty_like(weights, dtype=torch.int32)
    _route[(tokens,)](
        logits, weights, expert_ids, experts,
        EXPERTS=triton.next_power_of_2(experts), PER_TOKEN=per_token, BLOCK=triton.next_power_of_2(per_token),
        AMONG_CHOSEN=among_chosen, num_warps=1,
    )  # fmt: skip
    return weights, expert_ids


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
    expert_ids, counts, totals, order, tiles, pairs, chunks, num_experts, num_tiles,
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
        place += tl.sum(tl.where(expert[:, None] == experts[None, :], begin[None, :], 0), axis=1)
        tl.store(order + place, pair, mask=mask)
    tile = program * CHUNK + number
    if program * CHUNK < num_tiles:
        needed = (total + BLOCK_M - 1) // BLOCK_M
        tile_end = tl.cumsum(needed, axis=0)
        expert = tl.sum((tile_end[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        own = experts[None, :] == expert[:, None]
        first = begin - (tile_end - needed) * BLOCK_M
        row = tl.sum(tl.where(own, first[None, :], 0), axis=1) + tile * BLOCK_M
        stop = tl.sum(tl.where(own, end[None, :], 0), axis=1)
        mask = tile < num_tiles
        tl.store(tiles + tile, tl.where(stop > 0, expert, 0), mask=mask)
        tl.store(tiles + num_tiles + tile, tl.where(stop > 0, row, 0), mask=mask)
        tl.store(tiles + 2 * num_tiles + tile, stop, mask=mask)


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
    )
    _count[(chunks,)](expert_ids, counts, pairs, chunks, EXPERTS=padded, CHUNK=chunk, num_warps=4)
    _scan[(padded,)](counts, totals, chunks, BLOCK=256, num_warps=1)
    _place[(max(chunks, triton.cdiv(num_tiles, chunk)),)](
        expert_ids, counts, totals, groups.order, groups.tiles, pairs, chunks, experts, num_tiles,
        EXPERTS=padded, CHUNK=chunk, BLOCK_M=tile_rows, num_warps=16,
    )  # fmt: skip
    return groups


@triton.jit(
    do_not_specialize=["num_tiles", "alpha", "limit"],
    do_not_specialize_on_alignment=["order", "tiles", "bias"],
)
def _grouped_product(
    x, x_scale, weight, weight_scale, bias, out, order, tiles, num_tiles, per_token, columns, features,
    x_stride, out_stride, expert_stride, column_stride, feature_stride, alpha, limit,
    GATE: tl.constexpr, INTERLEAVED: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, SWAPPED: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Columns are those of the weights: of a gated product, two for each of the result's.
    GATED: tl.constexpr = GATE != ""
    num_blocks = tl.cdiv(columns, BLOCK_N)
    tile, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    row, stop = tl.load(tiles + num_tiles + tile), tl.load(tiles + 2 * num_tiles + tile)
    if row >= stop:
        return
    expert = tl.load(tiles + tile)
    # Rows and columns that are not there are computed like others, and not stored.
    rows = row + tl.arange(0, BLOCK_M)
    place = tl.minimum(rows, stop - 1)
    pair = tl.load(order + place)
    source = pair // per_token if GATED else place
    number = block * BLOCK_N + tl.arange(0, BLOCK_N)
    column = number % columns
    if GATED and not INTERLEAVED:
        # The gate's and the other half's columns in turns, so that those of a result meet in one thread.
        column = column // 2 + (column % 2) * (columns // 2)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x + source.to(tl.int64)[:, None] * x_stride + offs_k[None, :]
    weight_ptrs = weight + expert.to(tl.int64) * expert_stride
    weight_ptrs += column[:, None] * column_stride + offs_k[None, :] * feature_stride
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, features, BLOCK_K, num_stages=NUM_STAGES):
        if EVEN:
            a, w = tl.load(x_ptrs), tl.load(weight_ptrs)
        else:
            mask = (start + offs_k < features)[None, :]
            a, w = tl.load(x_ptrs, mask=mask, other=0.0), tl.load(weight_ptrs, mask=mask, other=0.0)
        if SWAPPED:
            acc = tl.dot(w, tl.trans(a), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * feature_stride
    if SWAPPED:
        acc = tl.trans(acc)
    if SCALED:
        acc *= tl.load(x_scale + source)[:, None] * tl.load(weight_scale + expert * columns + column)[None, :]
    if BIAS:
        acc += tl.load(bias + expert * columns + column)[None, :].to(tl.float32)
    mask_m = (rows < stop)[:, None]
    if GATED:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
        if GATE == "clamped":
            gate, up = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit) + 1.0
            gate = gate / (1.0 + tl.exp(-alpha * gate))
        else:
            gate = gate / (1.0 + tl.exp(-gate))
        number = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        out_ptrs = out + rows.to(tl.int64)[:, None] * out_stride + number[None, :]
        tl.store(
            out_ptrs, (gate * up).to(out.dtype.element_ty), mask=mask_m & (number < columns // 2)[None, :]
        )
    else:
        out_ptrs = out + pair.to(tl.int64)[:, None] * out_stride + number[None, :]
        tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=mask_m & (number < columns)[None, :])


def grouped_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    groups: Groups,
    tile: Tile,
    per_token: int,
    gate: str = "",
    interleaved: bool = False,
    alpha: float = 0.0,
    limit: float = 0.0,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> None:
    """Each pair's row times the transposed weights of its expert, plus the expert's bias.

    With a gate, the rows of x are tokens' and those of `out` in the groups' order; without one, the other way round,
    and those of `out` are pairs'.

    Args:
        x: (rows, features), contiguous. weight: (experts, columns, features), of any strides.
        bias: (experts, columns), contiguous. out: (pairs, columns), or with a gate half as many; contiguous.
        gate: "silu": silu(gate) * up. "clamped": gate * sigmoid(alpha * gate) * (up + 1), gate at most `limit` and up
            between plus and minus `limit`. "": none.
        interleaved: gates and ups are in turns, else all gates are in front.
        x_scale, weight_scale: of each row of x and of `weight`, where these are in fp8: (rows, 1) and
            (experts, columns, 1), float32, contiguous.
    """
    _, columns, features = weight.shape
    num_tiles = groups.tiles.shape[1]
    _grouped_product[(num_tiles * triton.cdiv(columns, tile.columns),)](
        x, x_scale, weight, weight_scale, bias, out, groups.order, groups.tiles, num_tiles, per_token, columns,
        features, x.stride(0), out.stride(0), *weight.stride(), alpha, limit,
        GATE=gate, INTERLEAVED=interleaved, SCALED=weight_scale is not None, BIAS=bias is not None,
        SWAPPED=tile.swapped, EVEN=features % tile.features == 0, BLOCK_M=tile.rows, BLOCK_N=tile.columns,
        BLOCK_K=tile.features, NUM_STAGES=tile.stages, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
    )  # fmt: skip


@triton.jit
def _quantize(x, out, scale, width, MOST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    numbers = tl.load(x + row * width + column, mask=mask, other=0.0).to(tl.float32)
    # Unlike tl.max, which would drop a number that is not one.
    broken = tl.sum(tl.where(numbers == numbers, 0, 1), axis=0)
    largest = tl.where(broken > 0, float("nan"), tl.maximum(tl.max(tl.abs(numbers), axis=0), 1e-12))
    tl.store(out + row * width + column, (numbers * (MOST / largest)).to(out.dtype.element_ty), mask=mask)
    tl.store(scale + row, largest / MOST)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `fp8.quantize_rows`, in one kernel: x (rows, features), contiguous."""
    rows, width = x.shape
    out, scale = torch.empty_like(x, dtype=FP8), torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    _quantize[(rows,)](x, out, scale, width, MOST=FP8_MAX, BLOCK=triton.next_power_of_2(width), num_warps=4)
    return out, scale


@triton.jit(do_not_specialize=["num_experts"])
def _weigh(parts, expert_ids, weights, out, per_token, num_experts, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    acc = tl.zeros((BLOCK,), tl.float32)
    for number in range(0, per_token):
        pair = token * per_token + number
        expert = tl.load(expert_ids + pair)
        if (expert >= 0) & (expert < num_experts):
            part = tl.load(parts + pair * width + column, mask=mask, other=0.0).to(tl.float32)
            acc += tl.load(weights + pair).to(tl.float32) * part
    tl.store(out + token * width + column, acc.to(out.dtype.element_ty), mask=mask)


def weigh(parts: Tensor, expert_ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    """(tokens, width): the sum of a token's parts times their weights, in float32, always in the same order.

    Args:
        parts: (tokens * experts per token, width), contiguous; those of experts that are not here are not read.
        expert_ids, weights: (tokens, experts per token), contiguous.
    """
    tokens, per_token = expert_ids.shape
    width = parts.shape[1]
    out = torch.empty((tokens, width), dtype=parts.dtype, device=parts.device)
    block = min(1024, triton.next_power_of_2(width))
    _weigh[(tokens, triton.cdiv(width, block))](
        parts, expert_ids, weights, out, per_token, experts, width, BLOCK=block, num_warps=4
    )
    return out
