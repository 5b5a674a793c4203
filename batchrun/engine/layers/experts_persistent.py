"""Grouped products of rows that lie one behind the other, in Triton: blocks of threads that stay for many tiles.

A block loads its next tile while it still stores the last one's results, which counts where products are short (as in
Triton's tutorial on persistent matrix multiplication).
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from batchrun.engine.layers.expert_groups import Groups

_INTERPRETED = 3
"""Blocks of threads where there is no GPU."""


@triton.jit(
    do_not_specialize=["num_tiles"],
    do_not_specialize_on_alignment=["order", "tiles", "tiles_needed"],
)
def _persistent_product(
    x, x_scale, weight, weight_scale, out, order, tiles, tiles_needed, num_tiles, columns, out_stride,
    FEATURES: tl.constexpr, SCALED: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_N // 2
    num_blocks = tl.cdiv(columns, BLOCK_N)
    for work in tl.range(tl.program_id(0), tl.load(tiles_needed) * num_blocks, BLOCKS, flatten=True):
        tile, block = work // num_blocks, work % num_blocks
        expert, row = tl.load(tiles + tile), tl.load(tiles + num_tiles + tile)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # Rows behind the expert's are the next one's; they are computed like others, and not stored.
        for start in tl.range(0, FEATURES, BLOCK_K, num_stages=NUM_STAGES):
            w = tl.reshape(weight.load([expert, 0, block * BLOCK_N, start]), (BLOCK_N, BLOCK_K))
            acc = tl.dot(x.load([row, start]), tl.trans(w), acc)
        stop = tl.load(tiles + 2 * num_tiles + tile)
        rows = row + tl.arange(0, BLOCK_M)
        place = tl.minimum(rows, stop - 1)
        pair = tl.load(order + place)
        if SCALED:
            column = tl.minimum(block * BLOCK_N + tl.arange(0, BLOCK_N), columns - 1)
            scale = tl.load(weight_scale + expert * columns + column)
            acc *= tl.load(x_scale + place)[:, None] * scale[None, :]
        # In halves, which need half the shared memory on their way to the rows' places.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        number = block * BLOCK_N + tl.arange(0, HALF)[None, :]
        out_ptrs = out + pair.to(tl.int64)[:, None] * out_stride + number
        mask = (rows < stop)[:, None]
        tl.store(out_ptrs, left.to(out.dtype.element_ty), mask=mask & (number < columns))
        tl.store(out_ptrs + HALF, right.to(out.dtype.element_ty), mask=mask & (number + HALF < columns))


def persistent_product(
    x: Tensor,
    weight: Tensor,
    described: TensorDescriptor,
    out: Tensor,
    groups: Groups,
    rows: int,
    warps: int,
    stages: int,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> None:
    """As `experts_kernels.grouped_product` without gate and bias.

    Args:
        described: the weights by blocks of (1, 1, columns, features).
        rows: of the groups' tiles.
    """
    _, _, block_n, block_k = described.block_shape
    _, columns, features = weight.shape
    blocks = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else _INTERPRETED
    _persistent_product[(blocks,)](
        TensorDescriptor.from_tensor(x, [rows, block_k]), x_scale, described, weight_scale, out, groups.order,
        groups.tiles, groups.needed, groups.tiles.shape[1], columns, out.stride(0),
        FEATURES=features, SCALED=weight_scale is not None, BLOCKS=blocks, BLOCK_M=rows, BLOCK_N=block_n,
        BLOCK_K=block_k, NUM_STAGES=stages, num_warps=warps,
    )  # fmt: skip
