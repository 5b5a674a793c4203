"""Cascade attention's plan: which sequences of a batch read what they begin with in common once for all of them.

Attention over a prefix does not depend on what follows it, so that the queries of several sequences with the same
prefix can go through its keys together, and each sequence's attention over its own rest is merged in by log-sum-exp
(Juravsky et al., "Hydragen", 2024; Ye et al., "Cascade Inference", 2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchrun.engine.paged.attention.architecture import Layer
from batchrun.engine.paged.schedule.batches import DecodeBatch
from batchrun.engine.paged.schedule.page_pool import NULL_PAGE

Ints = NDArray[np.int32]
Numbers = NDArray[np.int64]

PREFIX_STEP, MIN_PREFIX = 16, 64
"""Tokens. Prefixes are rounded down to the step, so that sequences whose rests begin with the same few words are no
groups of their own; shorter ones are not worth it."""

ROW_COST, GROUP_COST = 16, 512
"""Keys that could be read in the time that it takes to merge a row, and to begin with a group."""

STEP_COST = 32 << 20
"""Bytes of a layer's keys and values that could be read while a step's two more kernels are launched."""

PREFILL_COST = 1 << 19
"""Keys that small blocks of a layer could go through while a prefill batch's two more kernels are launched."""

MAX_ITEMS = 256
"""Of the step with most groups. Each is a block of threads for each key head."""

MIN_PREFILL_RESULTS = 8192
"""Results that a prefill batch has memory for, however few its tokens."""

MIN_FILL = 0.6
"""Of the rows of large blocks, from which on those are taken: few queries are done sooner in small ones, of which more
run at once."""

WANTED_BLOCKS, MIN_ITEM_KEYS, ITEM_KEYS_STEP = 512, 512, 128
"""Prefixes are split so that there are so many blocks of threads, into pieces of no fewer keys, each a multiple."""

ITEM_WIDTH, MEMBER_WIDTH = 6, 4


@dataclass(frozen=True, slots=True)
class CascadePlan:
    """Groups of a batch's tokens, in the form that the kernels read: a decode step has one token for each sequence.

    `starts` (sequences,) int32: how many leading tokens of a sequence its group reads, 0 without a group.

    `members` (members, MEMBER_WIDTH) int32, one for each token of a group, a group's one after another: the token;
    where its first result is; how far apart its results are; how many it has, one for each piece of the prefix.

    `items` (items, ITEM_WIDTH) int32, one for each piece of a prefix and as many of its group's members as fill a
    block: the first member; how many; a sequence whose block table begins with the prefix; the first key and the one
    behind the last; where the first member's result goes.

    `block_queries`: queries in a block of threads, one for each query head of a member that has its keys in common.
    `results`: of all members.
    """

    starts: Ints
    members: Ints
    items: Ints
    block_queries: int
    results: int


class CascadePlanner:
    """Plans of batches; one of decode batches is kept until a batch has other groups."""

    def __init__(self, layer: Layer, block_queries: tuple[int, int], itemsize: int) -> None:
        """`block_queries` are those of a small and of a large block; a key's number takes `itemsize` bytes."""
        self._block_queries, self._kv_heads = block_queries, layer.kv_heads
        small, large = (queries // (layer.query_heads // layer.kv_heads) for queries in block_queries)
        self._block_rows = small, large
        self._worth = STEP_COST // (2 * layer.kv_heads * layer.head_dim * itemsize)
        self._prefill_worth = max(1, PREFILL_COST // layer.kv_heads)
        self._seen: tuple[Ints, Ints] | None = None
        self._plan: CascadePlan | None = None

    def plan(self, batch: DecodeBatch) -> CascadePlan | None:
        """What the batch's rows read together; None where that would not save time."""
        common = batch.common // PREFIX_STEP * PREFIX_STEP
        common[common < MIN_PREFIX] = 0
        if not common.any():
            return None
        seen = batch.prompt_order, common
        if self._seen is None or not all(map(np.array_equal, seen, self._seen)):
            self._seen, self._plan = seen, self._planned(*seen)
        return self._plan

    def plan_prefill(
        self, block_tables: Ints, query_lens: Numbers, seq_lens: Numbers, page_size: int,
        first: int = 0, stop: int | None = None,
    ) -> CascadePlan | None:  # fmt: skip
        """Which sequences of a prefill batch, from `first` to before `stop`, read together pages that were there
        before: those of whole pages, all of whose tokens their queries see. None where that would not save time.

        A sequence's own queries go through its keys together anyway, so that only those of several sequences count
        which fill blocks better than the queries of each.
        """
        older = (seq_lens - query_lens) // page_size
        older[:first] = 0
        older[len(older) if stop is None else stop :] = 0
        order, common = _order_by_pages(block_tables, older)
        if not common.any():
            return None
        small, lens = self._block_rows[0], query_lens[order]
        groups = find_groups(common * page_size, small, lens, -(-lens // small))
        if sum(group.gain for group in groups) < self._prefill_worth:
            return None
        sequences = order[_members(groups)]
        counts = np.array([sum(stop - first for first, stop in group.spans) for group in groups])
        starts = np.zeros(len(query_lens), np.int32)
        starts[sequences] = np.repeat([group.tokens for group in groups], counts)
        lens, first_tokens = query_lens[sequences], _offsets(query_lens)[sequences]
        tokens = np.arange(lens.sum()) + np.repeat(first_tokens - _offsets(lens), lens)
        most_results = max(int(query_lens.sum()), MIN_PREFILL_RESULTS)
        return self._tables(groups, starts, tokens, sequences[_offsets(counts)], None, most_results)

    def _planned(self, order: Ints, common: Ints) -> CascadePlan | None:
        small = self._block_rows[0]
        groups = _most_useful(find_groups(common, small), small)
        if sum(group.gain for group in groups) < self._worth:
            return None
        members, rows = order[_members(groups)], np.array([group.rows for group in groups])
        starts = np.zeros(len(order), np.int32)
        starts[members] = np.repeat([group.tokens for group in groups], rows)
        leaders = members[_offsets(rows)]
        return self._tables(groups, starts, members, leaders, MAX_ITEMS, max_results(len(order)))

    def _tables(
        self, groups: list[Group], starts: Ints, members: Numbers | Ints, leaders: Numbers | Ints,
        most_items: int | None, most_results: int,
    ) -> CascadePlan:  # fmt: skip
        """The plan of groups with these members, a group's one after another; each group has a leader."""
        tokens = np.array([group.tokens for group in groups])
        rows = np.array([group.rows for group in groups])
        small, large = self._block_rows
        use_large = bool(rows.sum() >= MIN_FILL * (-(-rows // large) * large).sum())
        block_rows = large if use_large else small
        pieces, keys = self._split(tokens, rows, -(-rows // block_rows), most_items, most_results)
        first_member, first_result = _offsets(rows), _offsets(rows * pieces)
        return CascadePlan(
            starts,
            _member_table(members, rows, pieces, first_member, first_result),
            _item_table(leaders, tokens, rows, block_rows, pieces, keys, first_member, first_result),
            self._block_queries[use_large],
            int((rows * pieces).sum()),
        )

    def _split(
        self, tokens: Numbers, rows: Numbers, blocks: Numbers, most_items: int | None, most_results: int
    ) -> tuple[Numbers, Numbers]:
        """Pieces of each group's prefix, and the keys of each piece but the last, which may have fewer."""
        wanted = -(-WANTED_BLOCKS // self._kv_heads)
        most = max(MIN_ITEM_KEYS, int((blocks * tokens).sum()) // wanted)
        while True:
            pieces = -(-tokens // most)
            keys = -(-tokens // (pieces * ITEM_KEYS_STEP)) * ITEM_KEYS_STEP
            pieces = -(-tokens // keys)
            few_items = most_items is None or (blocks * pieces).sum() <= most_items
            if few_items and (rows * pieces).sum() <= most_results:
                return pieces, keys
            most *= 2


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts in order, as spans, whose `rows` read `tokens` together, which saves reading `gain` keys."""

    tokens: int
    spans: tuple[tuple[int, int], ...]
    rows: int
    gain: int


def find_groups(
    common: Ints | Numbers, block_rows: int, rows: Numbers | None = None, reads: Numbers | None = None
) -> list[Group]:
    """The groups that save most, of prompts in order with so many leading tokens in common with the one before.

    Each prompt has so many `rows`, of which `block_rows` read its keys at once, and by itself would have them read
    that often (`reads`); one of both without. Prompts that begin alike are groups within groups (a tree of intervals:
    Abouelhoda et al., 2004). Each is taken as a whole, or as the groups within it and one of the prompts that are in
    none of them.
    """
    one = range(len(common) + 1)
    sizes = _Sizes(
        block_rows,
        one if rows is None else [0, *np.cumsum(rows).tolist()],
        one if reads is None else [0, *np.cumsum(reads).tolist()],
    )
    changes = np.flatnonzero(common[1:] != common[:-1]) + 1
    # An interval's tokens, its first prompt, and the groups chosen within it.
    open_intervals: list[tuple[int, int, list[Group]]] = [(0, 0, [])]
    ends = [*changes.tolist(), len(common)]
    for place, tokens in zip(ends, [*common[changes].tolist(), 0], strict=True):
        first = place - 1
        chosen: list[Group] = []
        while open_intervals[-1][0] > tokens:
            own, first, inner = open_intervals.pop()
            chosen = _chosen(own, first, place, inner + chosen, sizes)
        if open_intervals[-1][0] < tokens:
            open_intervals.append((tokens, first, []))
        open_intervals[-1][2].extend(chosen)
    return open_intervals[0][2]


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Rows of a block, and how many rows and reads all prompts before each of them have; and all prompts."""

    block_rows: int
    rows: Many[int]
    reads: Many[int]

    def group(self, tokens: int, spans: tuple[tuple[int, int], ...]) -> Group:
        rows = sum(self.rows[stop] - self.rows[first] for first, stop in spans)
        reads = sum(self.reads[stop] - self.reads[first] for first, stop in spans)
        # A block of threads reads the keys once for its rows, the others find them in the cache.
        gain = (reads - -(-rows // self.block_rows)) * tokens - rows * ROW_COST - GROUP_COST
        return Group(tokens, spans, rows, gain)


def _chosen(tokens: int, first: int, stop: int, inner: list[Group], sizes: _Sizes) -> list[Group]:
    """An interval's groups: all of it, or those within it and one of the rest."""
    whole = sizes.group(tokens, ((first, stop),))
    if inner:
        rest = sizes.group(tokens, tuple(_gaps(first, stop, inner)))
        apart = [*inner, rest] if rest.gain > 0 else inner
        if sum(group.gain for group in apart) >= whole.gain:
            return apart
    return [whole] if whole.gain > 0 else []


def _gaps(first: int, stop: int, groups: list[Group]) -> Iterator[tuple[int, int]]:
    for begin, end in sorted(span for group in groups for span in group.spans):
        if first < begin:
            yield first, begin
        first = end
    if first < stop:
        yield first, stop


def _most_useful(groups: list[Group], block_rows: int) -> list[Group]:
    """As many groups as there can be items."""
    groups = sorted(groups, key=lambda group: -group.gain)
    items = np.cumsum([-(-group.rows // block_rows) for group in groups])
    return groups[: int(np.searchsorted(items, MAX_ITEMS, side="right"))]


def _members(groups: list[Group]) -> Numbers:
    """Places of the groups' prompts in their order."""
    return np.concatenate([np.arange(*span) for group in groups for span in group.spans])


def _order_by_pages(block_tables: Ints, pages: Numbers) -> tuple[Numbers, Numbers]:
    """Sequences in an order in which those stand side by side whose block tables begin alike, each as far as its first
    so many `pages`, and how many of these each has in common with the one before."""
    found = np.flatnonzero(pages)
    table = block_tables[found, : int(pages.max(initial=0))]
    table[np.arange(table.shape[1]) >= pages[found, None]] = NULL_PAGE
    # Bytes sort in C, and equal beginnings stand together.
    keys = [row.tobytes() for row in table]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    table = table[order]
    same = (table[1:] == table[:-1]) & (table[1:] != NULL_PAGE)
    common = np.zeros(len(order), np.int64)
    common[1:] = np.logical_and.accumulate(same, axis=1).sum(axis=1)
    return found[order], common


def _item_table(
    leaders: Numbers | Ints,
    tokens: Numbers,
    rows: Numbers,
    block_rows: int,
    pieces: Numbers,
    keys: Numbers,
    first_member: Numbers,
    first_result: Numbers,
) -> Ints:
    blocks = -(-rows // block_rows)
    group = np.repeat(np.arange(len(rows)), blocks * pieces)
    number = np.arange(len(group)) - _offsets(blocks * pieces)[group]
    piece, offset = number // blocks[group], number % blocks[group] * block_rows
    table = np.empty((len(group), ITEM_WIDTH), np.int32)
    table[:, 0] = first_member[group] + offset
    table[:, 1] = np.minimum(rows[group] - offset, block_rows)
    table[:, 2] = leaders[group]
    table[:, 3] = piece * keys[group]
    table[:, 4] = np.minimum(table[:, 3] + keys[group], tokens[group])
    table[:, 5] = first_result[group] + piece * rows[group] + offset
    # The longest first, so that none is left for the end alone.
    return table[np.argsort(table[:, 3] - table[:, 4], kind="stable")]


def _member_table(
    members: Numbers | Ints, rows: Numbers, pieces: Numbers, first_member: Numbers, first_result: Numbers
) -> Ints:
    group = np.repeat(np.arange(len(rows)), rows)
    table = np.empty((len(members), MEMBER_WIDTH), np.int32)
    table[:, 0] = members
    table[:, 1] = first_result[group] + np.arange(len(members)) - first_member[group]
    table[:, 2] = rows[group]
    table[:, 3] = pieces[group]
    return table


def max_results(rows: int) -> int:
    """Results of members that a decode step of so many rows has memory for."""
    return max(2 * rows, 1024)


def _offsets(counts: Numbers) -> Numbers:
    return np.cumsum(counts) - counts
