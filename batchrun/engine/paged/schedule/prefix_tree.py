"""Sequences that wait, in a tree of their prompts' beginnings: which of them is served next."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from batchrun.engine.paged.schedule.sequence import Sequence, common_prefix
from batchrun.engine.protocol import TokenIds

if TYPE_CHECKING:
    from batchrun.engine.paged.schedule.sequence import Sequence

BLOCK_TOKENS = 16
"""Tokens. A group's sequences agree in so many more than those of the group that it is part of: fewer are as well
computed again, and to bring together sequences with a word in common would cost the order by length."""

Rank = tuple[int, ...]
"""Of a sequence, lower ones first; no two sequences have the same."""


class PrefixTree:
    """Sequences in groups, and groups within groups, by what their prompts begin with (a radix tree over blocks).

    In a group the best sequence or subgroup goes first, a subgroup being as good as its best sequence, and a
    subgroup that was begun is served as a whole: what its sequences begin with is in the pool then. Operations take
    time in proportion to the prompt and to the groups around it, never to how many sequences wait.
    """

    def __init__(self) -> None:
        self._root = _Group(None, np.empty(0, np.int32), 0, 0)
        self._ties = itertools.count()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, rank: Rank, sequence: Sequence) -> None:
        """Adds a sequence."""
        self._count += 1
        prompt, group = sequence.prompt, self._root
        while len(prompt) - group.stop >= BLOCK_TOKENS:
            key = _key(prompt, group.stop)
            child = group.children.get(key)
            if child is None:
                child = group.children[key] = _Group(group, prompt, group.stop, _whole_blocks(len(prompt)))
            elif (stop := child.agrees_until(prompt)) < child.stop:
                child = self._split(group, key, child, stop)
            if not child.best or rank < child.best:
                child.best = rank
                if child is not group.current:
                    heapq.heappush(group.waiting, (rank, next(self._ties), child))
            group = child
        heapq.heappush(group.waiting, (rank, next(self._ties), sequence))

    def peek(self) -> Sequence:
        """The sequence that `pop` takes next; there has to be one."""
        sequence: Sequence = self._serving().waiting[0][-1]  # type: ignore[assignment]
        return sequence

    def pop(self) -> Sequence:
        """Takes the next sequence; there has to be one."""
        group = self._serving()
        sequence: Sequence = heapq.heappop(group.waiting)[-1]  # type: ignore[assignment]
        self._count -= 1
        while group.parent is not None and not group.children:
            group.forget_moved()
            if group.waiting:
                break
            parent = group.parent
            del parent.children[_key(group.prompt, group.start)]
            group.parent, parent.current, group = None, None, parent
        return sequence

    def __iter__(self) -> Iterator[tuple[Rank, Sequence]]:
        """All sequences with their ranks, in no order."""
        groups = [self._root]
        while groups:
            group = groups.pop()
            groups += group.children.values()
            for rank, _, item in group.waiting:
                if not isinstance(item, _Group):
                    yield rank, item

    def _serving(self) -> _Group:
        """The group whose best sequence is next; it and those around it are being served from now on."""
        group = self._root
        while True:
            if group.current is None:
                group.forget_moved()
                if not isinstance(group.waiting[0][-1], _Group):
                    return group
                group.current = heapq.heappop(group.waiting)[-1]  # type: ignore[assignment]
            assert group.current is not None
            group = group.current

    def _split(self, group: _Group, key: bytes, child: _Group, stop: int) -> _Group:
        """A group between the two, of what agrees with the child until `stop`."""
        upper = _Group(group, child.prompt, child.start, stop)
        upper.best, child.start, child.parent = child.best, stop, upper
        upper.children[_key(child.prompt, stop)] = child
        group.children[key] = upper
        if group.current is child:
            group.current, upper.current = upper, child
        else:
            heapq.heappush(upper.waiting, (child.best, next(self._ties), child))
            heapq.heappush(group.waiting, (upper.best, next(self._ties), upper))
        return upper


class _Group:
    """Sequences whose prompts agree with `prompt` until `stop`; `start` is where `parent`, the group around it, stops.

    `waiting` are heaps of sequences and subgroups. A subgroup may stand there several times: that with its `best` rank
    counts. `current` is the subgroup being served, which stands in `waiting` no more.
    """

    __slots__ = ("best", "children", "current", "parent", "prompt", "start", "stop", "waiting")

    def __init__(self, parent: _Group | None, prompt: TokenIds, start: int, stop: int) -> None:
        self.parent, self.prompt, self.start, self.stop = parent, prompt, start, stop
        self.best: Rank = ()
        self.children: dict[bytes, _Group] = {}
        self.waiting: list[tuple[Rank, int, Sequence | _Group]] = []
        self.current: _Group | None = None

    def agrees_until(self, prompt: TokenIds) -> int:
        """Where the first block ends that the group's sequences and this one do not share."""
        stop = min(self.stop, len(prompt))
        same = self.start + common_prefix(self.prompt[self.start : stop], prompt[self.start : stop])
        return _whole_blocks(same)

    def forget_moved(self) -> None:
        """Drops leading entries of subgroups that are gone, were split, or stand there with a better rank."""
        while self.waiting:
            rank, _, item = self.waiting[0]
            if not isinstance(item, _Group):
                return
            if item.parent is self and item is not self.current and item.best == rank:
                return
            heapq.heappop(self.waiting)


def _key(prompt: TokenIds, start: int) -> bytes:
    return prompt[start : start + BLOCK_TOKENS].tobytes()


def _whole_blocks(tokens: int) -> int:
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS
