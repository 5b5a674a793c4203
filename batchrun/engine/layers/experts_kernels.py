"""The experts of a layer on a GPU, in Triton: grouped products over the pairs of token and expert.

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
from triton.tools.tensor_descriptor import TensorDescriptor

from batchrun.engine.layers.descriptors import is_describable
from batchrun.engine.layers.expert_groups import Groups
from batchrun.engine.layers.experts_persistent import persistent_product
from batchrun.engine.layers.fp8 import FP8, FP8_MAX


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


@triton.jit
def _multiply(
    x, x_scale, weight, weight_scale, bias, out, order, expert, row, stop, block, per_token, columns, features,
    x_stride, out_stride, expert_stride, column_stride, feature_stride, alpha, limit,
    GATE: tl.constexpr, INTERLEAVED: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, SWAPPED: tl.constexpr,
    DESCRIBED: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Columns are those of the weights: of a gated product, two for each of the result's.
    GATED: tl.constexpr = GATE != ""
    HALF: tl.constexpr = BLOCK_N // 2
    # Rows and columns that are not there are computed like others, and not stored.
    rows = row + tl.arange(0, BLOCK_M)
    place = tl.minimum(rows, stop - 1)
    pair = tl.load(order + place)
    source = pair // per_token if GATED else place
    number = block * BLOCK_N + tl.arange(0, BLOCK_N)
    column = number % columns
    if DESCRIBED:
        # A block of gates, then that of the other half: what one descriptor loads.
        column = tl.arange(0, BLOCK_N) // HALF * (columns // 2)
        column += tl.minimum(block * HALF + tl.arange(0, BLOCK_N) % HALF, columns // 2 - 1)
    elif GATED and not INTERLEAVED:
        # The gate's and the other half's columns in turns, so that those of a result meet in one thread.
        column = column // 2 + (column % 2) * (columns // 2)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x + source.to(tl.int64)[:, None] * x_stride + offs_k[None, :]
    if not DESCRIBED:
        weight_ptrs = weight + expert.to(tl.int64) * expert_stride
        weight_ptrs += column[:, None] * column_stride + offs_k[None, :] * feature_stride
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, features, BLOCK_K, num_stages=NUM_STAGES):
        mask = (start + offs_k < features)[None, :]
        a = tl.load(x_ptrs) if EVEN else tl.load(x_ptrs, mask=mask, other=0.0)
        if DESCRIBED:
            w = weight.load([expert, 0, block * HALF, start])
            w = tl.reshape(w, (BLOCK_N, BLOCK_K))
        else:
            w = tl.load(weight_ptrs) if EVEN else tl.load(weight_ptrs, mask=mask, other=0.0)
            weight_ptrs += BLOCK_K * feature_stride
        if SWAPPED:
            acc = tl.dot(w, tl.trans(a), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
    if SWAPPED:
        acc = tl.trans(acc)
    if SCALED:
        acc *= tl.load(x_scale + source)[:, None] * tl.load(weight_scale + expert * columns + column)[None, :]
    if BIAS:
        acc += tl.load(bias + expert * columns + column)[None, :].to(tl.float32)
    mask_m = (rows < stop)[:, None]
    if GATED:
        if DESCRIBED:
            gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        else:
            gate, up = tl.split(tl.reshape(acc, (BLOCK_M, HALF, 2)))
        if GATE == "clamped":
            gate, up = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit) + 1.0
            gate = gate / (1.0 + tl.exp(-alpha * gate))
        else:
            gate = gate / (1.0 + tl.exp(-gate))
        number = block * HALF + tl.arange(0, HALF)
        out_ptrs = out + rows.to(tl.int64)[:, None] * out_stride + number[None, :]
        tl.store(
            out_ptrs, (gate * up).to(out.dtype.element_ty), mask=mask_m & (number < columns // 2)[None, :]
        )
    else:
        out_ptrs = out + pair.to(tl.int64)[:, None] * out_stride + number[None, :]
        tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=mask_m & (number < columns)[None, :])


@triton.jit(
    do_not_specialize=["num_tiles", "alpha", "limit"],
    do_not_specialize_on_alignment=["order", "tiles", "bias"],
)
def _grouped_product(
    x, x_scale, weight, weight_scale, bias, out, order, tiles, num_tiles, per_token, columns, features,
    x_stride, out_stride, expert_stride, column_stride, feature_stride, alpha, limit,
    GATE: tl.constexpr, INTERLEAVED: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, SWAPPED: tl.constexpr,
    DESCRIBED: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(columns, BLOCK_N)
    tile, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    row, stop = tl.load(tiles + num_tiles + tile), tl.load(tiles + 2 * num_tiles + tile)
    if row >= stop:
        return
    expert = tl.load(tiles + tile)
    # An expert's last rows are as often as not less than half a tile. Matrix units take 64 rows at least.
    if BLOCK_M >= 128 and stop - row <= BLOCK_M // 2:
        _multiply(
            x, x_scale, weight, weight_scale, bias, out, order, expert, row, stop, block, per_token, columns, features,
            x_stride, out_stride, expert_stride, column_stride, feature_stride, alpha, limit,
            GATE, INTERLEAVED, SCALED, BIAS, SWAPPED, DESCRIBED, EVEN, BLOCK_M // 2, BLOCK_N, BLOCK_K, NUM_STAGES,
            PRECISION,
        )  # fmt: skip
    else:
        _multiply(
            x, x_scale, weight, weight_scale, bias, out, order, expert, row, stop, block, per_token, columns, features,
            x_stride, out_stride, expert_stride, column_stride, feature_stride, alpha, limit,
            GATE, INTERLEAVED, SCALED, BIAS, SWAPPED, DESCRIBED, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES,
            PRECISION,
        )  # fmt: skip


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
    described = not interleaved and not tile.swapped and is_describable(weight)
    if described and not gate and bias is None and is_describable(x):
        blocks = _descriptor(weight, tile, 1)
        persistent_product(
            x, weight, blocks, out, groups, tile.rows, tile.warps, tile.stages, x_scale, weight_scale
        )
        return
    described = described and gate != ""
    _grouped_product[(num_tiles * triton.cdiv(columns, tile.columns),)](
        x, x_scale, _descriptor(weight, tile, 2) if described else weight, weight_scale, bias, out, groups.order,
        groups.tiles, num_tiles, per_token, columns, features, x.stride(0), out.stride(0), *weight.stride(), alpha,
        limit,
        GATE=gate, INTERLEAVED=interleaved, SCALED=weight_scale is not None, BIAS=bias is not None,
        SWAPPED=tile.swapped, DESCRIBED=described, EVEN=features % tile.features == 0, BLOCK_M=tile.rows,
        BLOCK_N=tile.columns, BLOCK_K=tile.features, NUM_STAGES=tile.stages,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=tile.warps,
    )  # fmt: skip


def _descriptor(weight: Tensor, tile: Tile, parts: int) -> TensorDescriptor:
    """Of blocks of an expert's columns, made of as many from each part: of gates and of what they are for."""
    blocks = [1, parts, tile.columns // parts, tile.features]
    return TensorDescriptor.from_tensor(weight.unflatten(1, (parts, -1)), blocks)


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
