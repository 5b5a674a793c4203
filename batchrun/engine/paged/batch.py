"""What one model call computes, and who computes its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from batchrun.engine.paged.architecture import Layer


@dataclass(frozen=True, slots=True)
class Trunk:
    """Pages that begin every row of a decode step; the step's own `tables` and `lengths` start after them.

    `table` (1, pages) int32; `ends` (2,) int32: 0 and how many tokens the trunk has; `starts` (2,) int32: 0 and how
    many rows there are.
    """

    table: Tensor
    ends: Tensor
    starts: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Where the tokens of one model call stand in the pool.

    `places` (tokens,) int64 is where each token's key and value go, page * page size + offset. `tables` (rows, pages)
    int32 and `lengths` (rows,) int32 are each row's pages and tokens, this call's included. A decode step has one
    token per row. A prefill has `starts` (rows + 1,) int32, where each row's tokens begin in the pack, `ends`
    (rows + 1,) int32, the running sum of `lengths`, and the longest of both; `fresh` when no row has older tokens.
    """

    places: Tensor
    tables: Tensor
    lengths: Tensor
    starts: Tensor | None = None
    ends: Tensor | None = None
    longest_query: int = 1
    longest: int = 0
    fresh: bool = False
    trunk: Trunk | None = None


class Provider(Protocol):
    """Attention over pages, with the call's own keys and values, which it also writes to the pages.

    `keys` and `values` are (pages, page size, kv heads, head size) of one layer; query, key and value are (tokens,
    heads, head size); `sinks` (query heads,) are logits without a value, where a model has them. Gives (tokens,
    query heads, head size).
    """

    name: str
    cascades: bool

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, batch: Batch, layer: Layer,
        sinks: Tensor | None,
    ) -> Tensor: ...  # fmt: skip

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, batch: Batch, layer: Layer,
        sinks: Tensor | None,
    ) -> Tensor: ...  # fmt: skip
