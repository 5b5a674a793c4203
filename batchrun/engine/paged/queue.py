"""Rows that wait: longest first, rows with the same beginning together."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from batchrun.engine.protocol import Request, TokenIds

_ALIKE = 64
"""Tokens. Rows that agree in so many belong to one group, which is served as a whole: its prefix is in the pool."""


@dataclass(eq=False, slots=True)
class Row:
    """A request on its way: what has been generated, and the pages that it holds.

    `prompt` is what has to be in the pool before the next token: the request's tokens and, after an eviction, the
    output so far. `cached` of them are there. `last` is how many tokens the pool holds when the row is done.
    """

    request: Request
    prompt: TokenIds
    last: int
    output: list[int] = field(default_factory=list)
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    admitted: int = -1
    done: bool = False

    @classmethod
    def of(cls, request: Request) -> Row:
        prompt = np.ascontiguousarray(request.start, dtype=np.int32)
        last = len(request.token_ids) + request.max_new_tokens - 1
        return cls(request, prompt, last, request.generated.tolist())


class Queue:
    """Waiting rows in the order to serve them; every operation is O(log rows).

    Rows that were evicted come first. Then one group of rows with the same beginning after another, the one with the
    longest row first, and in a group the longest row first, so that no long row is left to run alone at the end.
    """

    def __init__(self) -> None:
        self._first: deque[Row] = deque()
        self._groups: dict[bytes, list[tuple[int, int, Row]]] = {}
        self._order: list[tuple[int, int, bytes]] = []
        self._current = b""
        self._count = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return self._count + len(self._first)

    def push(self, row: Row) -> None:
        self._arrivals += 1
        self._count += 1
        key = (
            row.prompt[:_ALIKE].tobytes()
            if len(row.prompt) > _ALIKE
            else self._arrivals.to_bytes(8, "little")
        )
        group = self._groups.setdefault(key, [])
        entry = (-row.last, self._arrivals)
        if not group or entry < group[0][:2]:
            heapq.heappush(self._order, (*entry, key))
        heapq.heappush(group, (*entry, row))

    def push_first(self, row: Row) -> None:
        self._first.append(row)

    def peek(self) -> Row:
        """The row that `pop` takes next."""
        return self._first[0] if self._first else self._group()[0][2]

    def pop(self) -> Row:
        if self._first:
            return self._first.popleft()
        group = self._group()
        row = heapq.heappop(group)[2]
        self._count -= 1
        if not group:
            del self._groups[self._current]
        return row

    def take_cancelled(self) -> list[Row]:
        """Takes out the rows that are not wanted any more."""
        gone = [row for row in self._first if row.request.cancelled]
        self._first = deque(row for row in self._first if not row.request.cancelled)
        for key, group in list(self._groups.items()):
            kept = [entry for entry in group if not entry[2].request.cancelled]
            if len(kept) == len(group):
                continue
            gone += [entry[2] for entry in group if entry[2].request.cancelled]
            self._count -= len(group) - len(kept)
            heapq.heapify(kept)
            self._groups[key] = kept
            if not kept:
                del self._groups[key]
        return gone

    def _group(self) -> list[tuple[int, int, Row]]:
        """The group being served, or the next one. An entry of `_order` may be out of date: its row has gone."""
        while self._current not in self._groups:
            *entry, key = heapq.heappop(self._order)
            group = self._groups.get(key)
            if group and list(group[0][:2]) == entry:
                self._current = key
            elif group:
                heapq.heappush(self._order, (*group[0][:2], key))
        return self._groups[self._current]
