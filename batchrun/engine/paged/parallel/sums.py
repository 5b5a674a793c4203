"""What the ranks of an engine do together on their devices: sums and gathered columns, as operators, so that a compiled
layer stays whole."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from batchrun.engine.paged import devices
from batchrun.engine.paged.parallel.group import Group

CHUNKS = 4
"""In which a product of many rows is summed: all but the last while the next one is multiplied."""
CHUNKED_ROWS = 4096
"""From which on."""

# Its name since torch 2.13.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_peers: Any = None
"""How this rank sums few numbers with the others: a `PeerSum`, where the ranks can read each other's memory."""


def connect(group: Group) -> None:
    """Called by all ranks of a group that has come together, before any of them sums."""
    global _peers
    _peers = None
    if devices.is_gpu(group.device) and importlib.util.find_spec("triton"):
        from batchrun.engine.paged.parallel import peer_memory

        _peers = peer_memory.connect(group)


def _sum(x: Tensor) -> None:
    if _peers is not None and _peers.fits(x):
        _peers.add(x)
    else:
        dist.all_reduce(x)


@torch.library.custom_op("batchrun::sum_of_ranks", mutates_args=("x",))
def sum_of_ranks(x: Tensor) -> None:
    """x becomes its sum over all ranks, the same on each. An operator, so that a compiled layer stays whole."""
    _sum(x)


@sum_of_ranks.register_fake
def _(x: Tensor) -> None:
    return None


@torch.library.custom_op("batchrun::summed_linear", mutates_args=())
def summed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of this rank's part of the inputs, x (..., in features), summed over all ranks, the same on each:
    (..., out features). Of many rows those that are multiplied are summed while the next ones are multiplied."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) < CHUNKED_ROWS:
        made = functional.linear(rows, weight, bias)
        _sum(made)
    else:
        made = rows.new_empty(len(rows), len(weight))
        # Few different sizes, in whole blocks of products.
        size = -(-len(rows) // (CHUNKS * 128)) * 128
        sums = []
        for begin in range(0, len(rows), size):
            part = slice(begin, begin + size)
            if bias is None:
                torch.mm(rows[part], weight.t(), out=made[part])
            else:
                torch.addmm(bias, rows[part], weight.t(), out=made[part])
            sums.append(dist.all_reduce(made[part], async_op=True))
        for one in sums:
            one.wait()
    return made.view(*x.shape[:-1], len(weight))


@summed_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("batchrun::columns_of_ranks", mutates_args=())
def columns_of_ranks(x: Tensor, size: int) -> Tensor:
    """x (rows, columns) of all `size` ranks side by side: (rows, size * columns), the same on each."""
    gathered = x.new_empty(size * x.shape[0], x.shape[1])
    _all_gather(gathered, x.contiguous())
    return gathered.view(size, *x.shape).transpose(0, 1).reshape(x.shape[0], -1)


@columns_of_ranks.register_fake
def _(x: Tensor, size: int) -> Tensor:
    return x.new_empty(x.shape[0], size * x.shape[1])
