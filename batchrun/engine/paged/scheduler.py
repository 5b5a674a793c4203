"""Which rows run next: packs of prompts to compute, rounds of rows to decode, and who leaves when pages run out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from batchrun.engine.paged.pool import TRASH, Match, Pool
from batchrun.engine.paged.queue import Queue, Row
from batchrun.engine.protocol import Request

Ints = NDArray[np.int32]

SMALLEST_PACK = 16
"""Tokens. Where the device has no memory even for these, the row itself does not fit."""

LOOK_PAST = 256
"""Rows that are put back to the next pack, in which they can copy what this one computes, before it is cut short."""

EVEN_ROWS, EVEN_STEP, EVEN_SLACK = 256, 32, 1.2
"""A step of fewer rows takes a GPU hardly less time, since it reads the weights all the same; a step is captured for
a multiple of so many; and so much more than an even share, so that the longest row need not wait."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Prompt tokens `start` to `stop` of a row, computed in one pack. `copied` leading tokens of its page
    `copy_to` are first copied from page `copy_from`."""

    row: Row
    start: int
    stop: int
    copy_from: int = TRASH
    copy_to: int = TRASH
    copied: int = 0

    @property
    def complete(self) -> bool:
        """The row's first new token comes out of this pack."""
        return self.stop == len(self.row.prompt)


@dataclass(frozen=True, slots=True)
class Round:
    """`steps` decode steps for some rows, those with most tokens in the pool first.

    `tables` (rows, pages) int32 are their pages, `trunk` how many of the first ones all rows have in common.
    """

    rows: list[Row]
    slots: Ints
    tables: Ints
    steps: int
    trunk: int


class OutputLengths:
    """What rows are expected to generate, learned from those that have ended."""

    def __init__(self, certain: bool) -> None:
        self.certain = certain
        self._mean = 0.0
        self._seen = 0

    def learn(self, length: int) -> None:
        self._seen += 1
        self._mean += (length - self._mean) / min(self._seen, 1024)

    def expect(self, limits: Ints, done: Ints) -> Ints:
        """Tokens that rows will have generated when they end: (rows,) of at most `limits`, above `done`.

        Half as much again as the mean, because who guesses too low evicts rows and computes them twice.
        """
        if self.certain:
            return limits
        typical = 1.5 * self._mean + 16 if self._seen >= 32 else limits / 4 + 16
        expected: Ints = np.minimum(limits, np.maximum(typical, 1.25 * done + 16)).astype(np.int32)
        return expected


class Scheduler:
    """Rows from the queue into slots and pages, and out again.

    A round is planned while the one before it still runs, so lengths here run ahead of what has been read back: rows
    that end by length leave as planned, rows that end by a stop token one round late. Pages and slots are used again
    only by work that is handed to the device afterwards, and the device works in order.

    `last_rows` is for whoever calls to say: no rows will come but those that were added.
    """

    def __init__(
        self, pool: Pool, max_rows: int, prefill_tokens: int, max_context: int, lengths: OutputLengths
    ) -> None:
        self.pool = pool
        self.queue = Queue()
        self.lengths = lengths
        self.last_rows = False
        self.evictions = 0
        self.prompt_tokens = 0
        self.shared_tokens = 0
        self._prefill_tokens = prefill_tokens
        self._most_rows = max_rows
        self._rows: list[Row | None] = [None] * max_rows
        self._free_slots = list(range(max_rows - 1, -1, -1))
        self._table = np.zeros((max_rows, pool.pages_for(max_context)), np.int32)
        self._length = np.zeros(max_rows, np.int32)
        self._last = np.zeros(max_rows, np.int32)
        self._prompt = np.zeros(max_rows, np.int32)
        self._held = np.zeros(max_rows, np.int32)
        self._admitted = np.zeros(max_rows, np.int64)
        self._taken = np.zeros(max_rows, bool)
        self._decoding = np.zeros(max_rows, bool)
        self._admissions = 0
        self._partial: Row | None = None
        self._ending: list[Row] = []

    @property
    def active(self) -> int:
        """Rows that hold a slot."""
        return len(self._rows) - len(self._free_slots)

    @property
    def active_tokens(self) -> tuple[int, int]:
        """Of the prompts and the answers so far of rows that hold a slot."""
        prompt, length = self._prompt[self._taken], self._length[self._taken]
        return int(prompt.sum()), int(np.maximum(length - prompt, 0).sum())

    def add(self, request: Request) -> Row:
        """Queues a request. Its row must fit the pool: see `fits`."""
        row = Row.of(request)
        self.queue.push(row)
        return row

    def fits(self, request: Request) -> bool:
        """Whether the pool could hold the request if it were alone."""
        return self.pool.pages_for(len(request.token_ids) + request.max_new_tokens - 1) <= self.pool.pages

    def worth_a_pack(self) -> bool:
        """Whether enough rows can be admitted to fill the device: small packs cost as much time as large ones."""
        self._release_ended()
        if self._partial is not None:
            return True
        most = self._rows_at_once()
        if not len(self.queue) or not self._free_slots or self.active >= most:
            return False
        if not self.active:
            return True
        room, slots = self._room(), most - self.active
        wanted = min(len(self.queue), max(1, most // 16))
        return slots >= wanted and room >= min(
            self.pool.pages // 16, wanted * self._needs(self.queue.peek(), Match())
        )

    def next_pack(self) -> list[Segment]:
        """Prompts to compute together, at most `prefill_tokens` of them; empty when none fits."""
        self._release_ended()
        segments: list[Segment] = []
        tokens, room, most = self._prefill_tokens, self._room(), self._rows_at_once()
        if self._partial is not None:
            row, self._partial = self._partial, None
            segments.append(self._segment(row, row.cached, tokens))
            tokens -= segments[-1].stop - segments[-1].start
        waiting: list[Row] = []
        while tokens > 0 and len(self.queue) and self.active < most and self._partial is None:
            row = self.queue.peek()
            match = self.pool.match(row.prompt)
            if match.wait and len(waiting) < LOOK_PAST:
                waiting.append(self.queue.pop())
                continue
            needs = self._needs(row, match)
            if match.copied and needs > room:
                match = replace(match, source=TRASH, copied=0)
                needs = self._needs(row, match)
            start = len(match.pages) * self.pool.page_size + match.copied
            if match.wait or (segments and len(row.prompt) - start > tokens):
                break
            if needs > room and self.active:
                break
            room -= needs
            segments.append(self._admit(self.queue.pop(), match, start, tokens))
            tokens -= segments[-1].stop - start
        for row in waiting:
            self.queue.push_first(row)
        return segments

    def launched_pack(self) -> None:
        """The last pack has been handed to the device."""
        self.pool.launched()

    def short_of_pages(self, steps: int) -> bool:
        """Whether the next round would have to evict a row."""
        self._release_ended()
        slots = np.flatnonzero(self._decoding)
        return int(self._growth(slots, steps).sum()) > self.pool.available

    def next_round(self, steps: int) -> Round | None:
        """At most `steps` decode steps for every row whose prompt is computed; None when there is none.

        Evicts the youngest rows while pages are short; whoever calls must have read back every round before,
        if `short_of_pages`, since an evicted row keeps its output.
        """
        self._release_ended()
        slots = np.flatnonzero(self._decoding)
        while int(self._growth(slots, steps).sum()) > self.pool.available:
            self._evict()
            slots = np.flatnonzero(self._decoding)
        if not len(slots):
            return None
        slots = slots[np.argsort(-self._length[slots], kind="stable")].astype(np.int32)
        growth = self._growth(slots, steps)
        for slot, count in zip(slots[growth > 0].tolist(), growth[growth > 0].tolist(), strict=True):
            self._extend(slot, self.pool.take(count))
        steps = int(min(steps, (self._last[slots] - self._length[slots]).max()))
        self._length[slots] = np.minimum(self._length[slots] + steps, self._last[slots])
        rows = [self._rows[slot] for slot in slots.tolist()]
        for slot in slots[self._length[slots] == self._last[slots]].tolist():
            self._end(slot)
        width = int(self._held[slots].max())
        tables = self._table[slots, :width]
        return Round(rows, slots, tables, steps, self._trunk(slots, tables))  # type: ignore[arg-type]

    def finish(self, row: Row) -> None:
        """A row has ended, expected or not: what it holds is free for work handed over from now on."""
        if row.done:
            return
        row.done = True
        self.lengths.learn(len(row.output))
        if row.slot >= 0 and row not in self._ending:
            self._release(row)

    @property
    def unwanted(self) -> bool:
        """Whether an active row is not wanted any more."""
        return any(row is not None and row.request.cancelled for row in self._rows)

    def let_go(self) -> list[Row]:
        """Rows that are not wanted any more leave, waiting or active; every round must have been read back before."""
        self._release_ended()
        gone = self.queue.take_cancelled()
        for row in self._rows:
            if row is not None and row.request.cancelled:
                gone.append(row)
                self._release(row)
                row.done = True
                if row is self._partial:
                    self._partial = None
        return gone

    def retreat(self, work: list[Segment] | Round) -> bool:
        """Work that did not fit the device is undone; its rows wait again, and later work is half as large.

        Whoever calls must have read back every round before. False, and nothing is undone, if it cannot be halved.
        """
        if isinstance(work, Round):
            rows, smaller = work.rows, len(work.rows) // 2
            self._most_rows = smaller or self._most_rows
        else:
            rows, smaller = [segment.row for segment in work], self._prefill_tokens // 2
            if len(rows) == 1 and smaller < SMALLEST_PACK:
                return False
            self._prefill_tokens = max(1, smaller)
            for segment in work:  # what was to be computed is not
                self.pool.forget(segment.row.pages[segment.start // self.pool.page_size :])
        if not smaller:
            return False
        for row in reversed(rows):
            if row.slot >= 0 and not row.done:
                self._requeue(row)
        self._ending = [row for row in self._ending if row.slot >= 0]
        self.pool.launched()
        return True

    def fail(self, row: Row) -> None:
        """A row whose work never ran leaves."""
        row.done = True
        if row is self._partial:
            self._partial = None
        self.pool.forget(row.pages)
        self._ending = [other for other in self._ending if other is not row]
        self._release(row)
        self.pool.launched()

    def drop_all(self) -> None:
        """Lets every row go, waiting or active."""
        self._release_ended()
        self._partial = None
        for row in self._rows:
            if row is not None:
                self._release(row)
        self.pool.launched()
        self.queue = Queue()

    def check(self) -> None:
        """Raises AssertionError where pages have leaked or are held by mistake."""
        self.pool.check(
            [row.pages for row in self._rows if row is not None] + [[p] for p in self.pool.borrowed]
        )

    def _rows_at_once(self) -> int:
        """As many as the device takes; of the last rows, if it is known how long they get, as many as let the short
        ones last as long as the longest. All at once, they would soon be gone and leave it to steps of a few rows."""
        if not (self.last_rows and self.lengths.certain):
            return self._most_rows
        slots = np.flatnonzero(self._taken)
        left = self._last[slots] - self._length[slots]
        tokens = self.queue.new_tokens + int(left.sum())
        longest = max(self.queue.longest, int(left.max(initial=1)))
        even = math.ceil(EVEN_SLACK * tokens / longest / EVEN_STEP) * EVEN_STEP
        return min(self._most_rows, max(EVEN_ROWS, even))

    def _room(self) -> int:
        """Pages that no active row is expected to need."""
        slots = np.flatnonzero(self._taken)
        done = self._length[slots] + 1 - self._prompt[slots]
        limits = self._last[slots] + 1 - self._prompt[slots]
        final = self._prompt[slots] + self.lengths.expect(limits, done) - 1
        growth = -(-final // self.pool.page_size) - self._held[slots]
        return self.pool.available - int(np.maximum(growth, 0).sum())

    def _needs(self, row: Row, match: Match) -> int:
        """Pages that `available` loses by admitting the row and running it to its expected end."""
        prompt, done = len(row.request.token_ids), len(row.output)
        limit = row.request.max_new_tokens
        new = int(self.lengths.expect(np.array([limit], np.int32), np.array([done], np.int32))[0])
        tokens = max(prompt + new - 1, len(row.prompt))
        source = [match.source] if match.copied else []
        return self.pool.pages_for(tokens) - len(match.pages) + self.pool.idle([*match.pages, *source])

    def _admit(self, row: Row, match: Match, start: int, tokens: int) -> Segment:
        first = row.admitted < 0
        self._admissions += 1
        row.slot, row.admitted = self._free_slots.pop(), self._admissions
        slot = row.slot
        self._rows[slot], self._taken[slot] = row, True
        self._prompt[slot], self._last[slot] = len(row.request.token_ids), row.last
        self._length[slot], self._admitted[slot], self._held[slot] = 0, row.admitted, 0
        self.pool.share(match.pages)
        if match.copied:
            self.pool.borrow(match.source)
        own = self.pool.take(self.pool.pages_for(len(row.prompt)) - len(match.pages))
        row.pages = []
        self._extend(slot, [*match.pages, *own])
        if first:
            self.prompt_tokens += len(row.prompt)
            self.shared_tokens += start
        return self._segment(row, start, tokens, match.source, match.copied)

    def _segment(self, row: Row, start: int, tokens: int, source: int = TRASH, copied: int = 0) -> Segment:
        stop = min(len(row.prompt), start + tokens)
        self.pool.index(row.prompt, row.pages, start, stop)
        row.cached = stop
        self._length[row.slot] = stop
        target = row.pages[start // self.pool.page_size] if copied else TRASH
        segment = Segment(row, start, stop, source, target, copied)
        if not segment.complete:
            self._partial = row
        elif row.last == stop:
            self._end(row.slot)
        else:
            self._decoding[row.slot] = True
        return segment

    def _growth(self, slots: NDArray[np.intp] | Ints, steps: int) -> Ints:
        """Pages that each row lacks for `steps` more tokens, or for its last."""
        target = np.minimum(self._length[slots] + steps, self._last[slots])
        return np.maximum(-(-target // self.pool.page_size) - self._held[slots], 0)

    def _extend(self, slot: int, pages: list[int]) -> None:
        row, held = self._rows[slot], int(self._held[slot])
        assert row is not None
        row.pages += pages
        self._table[slot, held : held + len(pages)] = pages
        self._held[slot] += len(pages)

    def _trunk(self, slots: Ints, tables: Ints) -> int:
        """Leading pages that all rows share; never a row's last page, which is still written to."""
        if len(slots) < 2:
            return 0
        most = int(self._held[slots].min()) - 1
        different = np.flatnonzero((tables[:, :most] != tables[0, :most]).any(axis=0))
        return int(different[0]) if len(different) else most

    def _evict(self) -> None:
        """The youngest row goes back to the queue. The oldest never leaves, so that the run goes on."""
        slots = np.flatnonzero(self._decoding)
        row = self._rows[slots[self._admitted[slots].argmax()]]
        assert row is not None
        self._requeue(row)
        self.evictions += 1

    def _requeue(self, row: Row) -> None:
        if row is self._partial:
            self._partial = None
        self._release(row)
        row.prompt = np.concatenate([row.request.token_ids, np.array(row.output, np.int32)]).astype(np.int32)
        row.cached = 0
        self.queue.push_first(row)

    def _end(self, slot: int) -> None:
        """No step after the coming one is needed; what the row holds is, until that one has been handed over."""
        row = self._rows[slot]
        assert row is not None
        self._decoding[slot] = False
        self._ending.append(row)

    def _release_ended(self) -> None:
        for row in self._ending:
            self._release(row)
        self._ending.clear()

    def _release(self, row: Row) -> None:
        self.pool.release(row.pages)
        self._decoding[row.slot] = self._taken[row.slot] = False
        self._rows[row.slot] = None
        self._free_slots.append(row.slot)
        row.slot, row.pages = -1, []
