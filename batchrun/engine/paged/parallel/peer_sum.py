"""Small sums over the ranks of one machine in a single kernel, by reading each other's memory.

A decode step has two sums a layer, of so few numbers that NCCL takes longer to begin than to send them. Here every rank
writes its part where the others can read it, says so, and adds up all parts by itself: one shot instead of a ring.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = 128
"""Of threads, each with a flag of its own for each other rank: nearly all that an H100 runs at once."""
CAPACITY = 16 << 20
"""Bytes of one sum at most."""
BLOCK = 4096
_FLAG_BYTES = 64 << 10
MAX_RANKS = _FLAG_BYTES // (4 * BLOCKS)
MEMORY_BYTES = _FLAG_BYTES + 2 * CAPACITY
"""Of each rank's memory that the others read: flags, and room for two parts, used in turns."""


@triton.jit
def _sum(
    x, addresses, epochs, count,
    RANK: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, FLAG_BYTES: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    # Flags count up and are never taken back, so that no rank waits for another to have seen one. Each block counts for
    # itself, and all the same.
    epoch = tl.load(epochs + block) + 1
    tl.store(epochs + block, epoch)
    room = FLAG_BYTES + (epoch & 1).to(tl.int64) * CAPACITY
    if block * BLOCK < count:
        mine = tl.multiple_of((tl.load(addresses + RANK) + room).to(tl.pointer_type(x.dtype.element_ty)), 16)
        for start in range(block * BLOCK, count, BLOCKS * BLOCK):
            offset = start + tl.arange(0, BLOCK)
            mask = offset < count
            tl.store(mine + offset, tl.load(x + offset, mask=mask), mask=mask)
        # What the block's other threads have written is told of, too.
        tl.debug_barrier()
        for rank in tl.static_range(SIZE):
            if rank != RANK:
                flags = tl.load(addresses + rank).to(tl.pointer_type(tl.int32))
                tl.atomic_xchg(flags + RANK * BLOCKS + block, epoch, sem="release", scope="sys")
        flags = tl.load(addresses + RANK).to(tl.pointer_type(tl.int32))
        for rank in tl.static_range(SIZE):
            if rank != RANK:
                flag = flags + rank * BLOCKS + block
                # By the difference, since a count in 32 bits begins again after days.
                while tl.atomic_add(flag, 0, sem="acquire", scope="sys") - epoch < 0:
                    pass
        tl.debug_barrier()
        for start in range(block * BLOCK, count, BLOCKS * BLOCK):
            offset = start + tl.arange(0, BLOCK)
            mask = offset < count
            total = tl.zeros((BLOCK,), tl.float32)
            # In the ranks' order on each of them, and rounded once: the same bits everywhere.
            for rank in tl.static_range(SIZE):
                part = tl.multiple_of(
                    (tl.load(addresses + rank) + room).to(tl.pointer_type(x.dtype.element_ty)), 16
                )
                total += tl.load(part + offset, mask=mask, cache_modifier=".cg").to(tl.float32)
            tl.store(x + offset, total.to(x.dtype.element_ty), mask=mask)


class PeerSum:
    """One rank's side of such sums.

    Two rooms for parts, in turns, spare a second wait: a rank that writes the one again has waited in the sum between
    for every other to begin with that, and so to have read the one before.
    """

    def __init__(self, rank: int, addresses: list[int], device: torch.device, memory: object = None) -> None:
        """`addresses` are where this process finds the memory of each rank, MEMORY_BYTES that were zero when the last
        rank came here. `memory` is what keeps them."""
        self._memory = memory
        self._rank, self._size = rank, len(addresses)
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._epochs = torch.zeros(BLOCKS, dtype=torch.int32, device=device)

    def fits(self, x: Tensor) -> bool:
        """Whether `x` is small enough for it."""
        return x.numel() * x.element_size() <= CAPACITY

    def add(self, x: Tensor) -> None:
        """x, contiguous, becomes its sum over all ranks, the same bits on each. All of them call it with the same sizes
        and in the same order, on one stream each; may be captured."""
        if x.numel():
            _sum[(BLOCKS,)](
                x, self._addresses, self._epochs, x.numel(), RANK=self._rank, SIZE=self._size, BLOCKS=BLOCKS,
                FLAG_BYTES=_FLAG_BYTES, CAPACITY=CAPACITY, BLOCK=BLOCK, num_warps=16,
            )  # fmt: skip
