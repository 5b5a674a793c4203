"""What the ranks of an engine do together on their devices: sums and gathered columns, as operators, so that a compiled
layer stays whole."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchrun.engine.layers.fp8 import scaled_product_into
from batchrun.engine.paged.attention import devices
from batchrun.engine.paged.device.group import Group

CHUNK_ROWS = 4096
"""A product of more rows is summed chunk by chunk of at most so many, all but the last while the next is multiplied."""

# Its name since torch 2.13.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_peers: Any = None
"""How this rank sums few numbers with the others: a `PeerSum`, where the ranks can read each other's memory."""


_pair: Any = None
"""And products of many rows, where there are two ranks: a `PeerProduct`."""


def connect(group: Group) -> None:
    """Called by all ranks of a group that has come together, before any of them sums."""
    global _pair, _peers
    _pair = _peers = None
    if devices.is_gpu(group.device) and importlib.util.find_spec("triton"):
        from batchrun.engine.paged.parallel import peer_memory, peer_product

        _peers = peer_memory.connect(group)
        _pair = peer_product.PeerProduct(group) if _peers is not None and group.size == 2 else None


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
    """A linear layer of this rank's part of the inputs, x (rows, in features), summed over all ranks, the same on each:
    (rows, out features)."""
    if _pair is not None and len(x) > CHUNK_ROWS and not torch.cuda.is_current_stream_capturing():
        made: Tensor = _pair.linear(x, weight, bias)
        return made

    def multiply(part: slice, out: Tensor) -> None:
        if bias is None:
            torch.mm(x[part], weight.t(), out=out)
        else:
            torch.addmm(bias, x[part], weight.t(), out=out)

    return _summed(multiply, x.new_empty(len(x), len(weight)))


@summed_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("batchrun::summed_fp8_linear", mutates_args=())
def summed_fp8_linear(
    rows: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same of numbers in fp8, see `scaled_product`, in `dtype`."""

    def multiply(part: slice, out: Tensor) -> None:
        scaled_product_into(rows[part], scale[part], weight, weight_scale, out)
        if bias is not None:
            out += bias

    return _summed(multiply, rows.new_empty(len(rows), len(weight), dtype=dtype))


@summed_fp8_linear.register_fake
def _(
    rows: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0], dtype=dtype)


def _summed(multiply: Callable[[slice, Tensor], None], made: Tensor) -> Tensor:
    """`made`, filled by `multiply` and summed. Of many rows some are multiplied at a time, and summed while the next
    ones are multiplied."""
    if len(made) <= CHUNK_ROWS:
        multiply(slice(None), made)
        _sum(made)
        return made
    # Of about the same size, in whole blocks of products.
    size = -(-len(made) // (-(-len(made) // CHUNK_ROWS) * 128)) * 128
    sums = []
    for begin in range(0, len(made), size):
        part = slice(begin, begin + size)
        multiply(part, made[part])
        sums.append(dist.all_reduce(made[part], async_op=True))
    for one in sums:
        one.wait()
    return made


@torch.library.custom_op("batchrun::columns_of_ranks", mutates_args=())
def columns_of_ranks(x: Tensor, size: int) -> Tensor:
    """x (rows, columns) of all `size` ranks side by side: (rows, size * columns), the same on each."""
    gathered = x.new_empty(size * x.shape[0], x.shape[1])
    _all_gather(gathered, x.contiguous())
    return gathered.view(size, *x.shape).transpose(0, 1).reshape(x.shape[0], -1)


@columns_of_ranks.register_fake
def _(x: Tensor, size: int) -> Tensor:
    return x.new_empty(x.shape[0], size * x.shape[1])
