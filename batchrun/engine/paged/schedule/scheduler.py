"""Which sequences run next: prompts to prefill, sequences to decode, and which are preempted when pages run out."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from batchrun.engine.paged.schedule.batches import DecodeBatch, Ints, PrefillChunk
from batchrun.engine.paged.schedule.output_lengths import OutputLengths
from batchrun.engine.paged.schedule.page_pool import MIN_COPIED_TOKENS, NULL_PAGE, PagePool, PrefixMatch
from batchrun.engine.paged.schedule.prompt_order import PromptOrder
from batchrun.engine.paged.schedule.queue import WaitingQueue
from batchrun.engine.paged.schedule.sequence import Sequence
from batchrun.engine.protocol import Request

MIN_PREFILL_TOKENS = 16
"""Tokens. Where the device has no memory even for these, the sequence itself does not fit."""

MAX_DEFERRED = 1024
"""Sequences deferred to the next prefill, in which they can copy what this one computes, before it is cut short."""

EVEN_SEQUENCES, EVEN_STEP, EVEN_SLACK = 256, 32, 1.2
"""A step of fewer sequences takes a GPU hardly less time, since it reads the weights all the same; a step is captured
for a multiple of so many; and so much more than an even share, so that the longest sequence need not wait."""


class Scheduler:
    """Sequences from the queue into slots and pages, and out again.

    A decode batch is planned while the one before it still runs, so lengths here run ahead of what has been read back:
    sequences that end by length leave as planned, sequences that end by a stop token one round late. Pages and slots
    are used again only by work that is handed to the device afterwards, and the device works in order.

    `no_more_requests` is for whoever calls to say: no sequences will come but those that were added.
    """

    def __init__(
        self,
        pool: PagePool,
        max_sequences: int,
        prefill_tokens: int,
        max_context: int,
        output_lengths: OutputLengths,
    ) -> None:
        self.pool = pool
        self.queue = WaitingQueue()
        self.output_lengths = output_lengths
        self.no_more_requests = False
        self.preemptions = 0
        self.prompt_tokens = 0
        self.shared_tokens = 0
        self._prefill_tokens = prefill_tokens
        self._max_sequences = max_sequences
        self._sequences: list[Sequence | None] = [None] * max_sequences
        self._free_slots = list(range(max_sequences - 1, -1, -1))
        self._block_tables = np.zeros((max_sequences, pool.pages_for(max_context)), np.int32)
        self._seq_lens = np.zeros(max_sequences, np.int32)
        self._final_lens = np.zeros(max_sequences, np.int32)
        self._prompt_lens = np.zeros(max_sequences, np.int32)
        self._num_pages = np.zeros(max_sequences, np.int32)
        self._admitted = np.zeros(max_sequences, np.int64)
        self._occupied = np.zeros(max_sequences, bool)
        self._decoding = np.zeros(max_sequences, bool)
        self._prompt_order = PromptOrder(max_sequences)
        # A decoding sequence's number in its batch, by its slot.
        self._rows = np.zeros(max_sequences, np.int32)
        self._admissions = 0
        self._partial_sequence: Sequence | None = None
        self._ending: list[Sequence] = []

    @property
    def active(self) -> int:
        """Sequences that hold a slot."""
        return len(self._sequences) - len(self._free_slots)

    @property
    def active_tokens(self) -> tuple[int, int]:
        """Of the prompts and the answers so far of sequences that hold a slot."""
        prompts, lengths = self._prompt_lens[self._occupied], self._seq_lens[self._occupied]
        return int(prompts.sum()), int(np.maximum(lengths - prompts, 0).sum())

    def add(self, request: Request) -> Sequence:
        """Queues a request. Its sequence must fit the pool: see `fits`."""
        sequence = Sequence.of(request)
        self.queue.push(sequence)
        return sequence

    def fits(self, request: Request) -> bool:
        """Whether the pool could hold the request if it were alone."""
        return self.pool.pages_for(len(request.token_ids) + request.max_new_tokens - 1) <= self.pool.num_pages

    def should_prefill(self) -> bool:
        """Whether enough sequences can be admitted to fill the device: small prefill batches cost as much time as
        large ones."""
        self._release_ended()
        if self._partial_sequence is not None:
            return True
        most = self._max_active()
        if not len(self.queue) or not self._free_slots or self.active >= most:
            return False
        if not self.active:
            return True
        spare, slots = self._spare_pages(), most - self.active
        wanted = min(len(self.queue), max(1, most // 16))
        return slots >= wanted and spare >= min(
            self.pool.num_pages // 16, wanted * self._pages_needed(self.queue.peek(), PrefixMatch())
        )

    def next_prefill(self) -> list[PrefillChunk]:
        """Prompts to compute together, at most `prefill_tokens` of them; empty when none fits."""
        self._release_ended()
        chunks: list[PrefillChunk] = []
        tokens, spare, most = self._prefill_tokens, self._spare_pages(), self._max_active()
        if self._partial_sequence is not None:
            sequence, self._partial_sequence = self._partial_sequence, None
            chunks.append(self._chunk(sequence, sequence.computed_tokens, tokens))
            tokens -= chunks[-1].stop - chunks[-1].start
        deferred: list[Sequence] = []
        while tokens > 0 and len(self.queue) and self._partial_sequence is None:
            # Deferred ones keep their slots: no later sequence takes them.
            if self.active + len(deferred) >= most:
                break
            sequence = self.queue.peek()
            match = self.pool.match_prefix(sequence.prompt, sequence.states, sequence.root)
            if match.wait and len(deferred) < MAX_DEFERRED:
                deferred.append(self.queue.pop())
                continue
            needed = self._pages_needed(sequence, match)
            if match.copied and needed > spare:
                match = replace(match, copy_from=NULL_PAGE, copied=0)
                needed = self._pages_needed(sequence, match)
            start = len(match.pages) * self.pool.page_size + match.copied
            # For a few tokens it is not worth cutting the prefill short.
            if match.wait >= MIN_COPIED_TOKENS or (chunks and len(sequence.prompt) - start > tokens):
                break
            if needed > spare and self.active:
                break
            spare -= needed
            chunks.append(self._admit(self.queue.pop(), match, start, tokens))
            tokens -= chunks[-1].stop - start
        for sequence in deferred:
            self.queue.push_front(sequence)
        return chunks

    def prefill_launched(self) -> None:
        """The last prefill batch has been handed to the device."""
        self.pool.launched()

    def must_preempt(self, steps: int) -> bool:
        """Whether the next decode batch would have to preempt a sequence."""
        self._release_ended()
        slots = np.flatnonzero(self._decoding)
        return int(self._missing_pages(slots, steps).sum()) > self.pool.available

    def next_decode(self, steps: int) -> DecodeBatch | None:
        """At most `steps` decode steps for every sequence whose prompt is computed; None when there is none.

        Preempts the youngest sequences while pages are short; whoever calls must have read back every round before,
        if `must_preempt`, since an preempted sequence keeps its output.
        """
        self._release_ended()
        slots = np.flatnonzero(self._decoding)
        while int(self._missing_pages(slots, steps).sum()) > self.pool.available:
            self._preempt()
            slots = np.flatnonzero(self._decoding)
        if not len(slots):
            return None
        slots = slots[np.argsort(-self._seq_lens[slots], kind="stable")].astype(np.int32)
        missing = self._missing_pages(slots, steps)
        for slot, count in zip(slots[missing > 0].tolist(), missing[missing > 0].tolist(), strict=True):
            self._extend(slot, self.pool.allocate(count))
        steps = int(min(steps, (self._final_lens[slots] - self._seq_lens[slots]).max()))
        self._seq_lens[slots] = np.minimum(self._seq_lens[slots] + steps, self._final_lens[slots])
        sequences = [self._sequences[slot] for slot in slots.tolist()]
        self._rows[slots] = np.arange(len(slots))
        prompt_order, common = self._rows[self._prompt_order.slots], self._prompt_order.common.copy()
        for slot in slots[self._seq_lens[slots] == self._final_lens[slots]].tolist():
            self._end(slot)
        width = int(self._num_pages[slots].max())
        return DecodeBatch(
            sequences,  # type: ignore[arg-type]
            slots,  # type: ignore[arg-type]
            self._block_tables[slots, :width],
            steps,
            prompt_order,
            common,
        )

    def finish(self, sequence: Sequence) -> None:
        """A sequence has ended, expected or not: what it holds is free for work handed over from now on."""
        if sequence.finished:
            return
        sequence.finished = True
        self.output_lengths.learn(len(sequence.output))
        if sequence.slot >= 0 and sequence not in self._ending:
            self._release(sequence)

    @property
    def has_cancelled(self) -> bool:
        """Whether an active sequence is cancelled."""
        return any(sequence is not None and sequence.request.cancelled for sequence in self._sequences)

    def abort_cancelled(self) -> list[Sequence]:
        """Sequences that are not wanted any more leave, waiting or active; every round must have been read back
        before."""
        self._release_ended()
        aborted = self.queue.take_cancelled()
        for sequence in self._sequences:
            if sequence is not None and sequence.request.cancelled:
                aborted.append(sequence)
                self._release(sequence)
                sequence.finished = True
                if sequence is self._partial_sequence:
                    self._partial_sequence = None
        return aborted

    def shrink_after_oom(self, work: list[PrefillChunk] | DecodeBatch) -> bool:
        """Work that did not fit the device is undone; its sequences wait again, and later work is half as large.

        Whoever calls must have read back every round before. False, and nothing is undone, if it cannot be halved.
        """
        if isinstance(work, DecodeBatch):
            sequences, smaller = work.sequences, len(work.sequences) // 2
            self._max_sequences = smaller or self._max_sequences
        else:
            sequences, smaller = [chunk.sequence for chunk in work], self._prefill_tokens // 2
            if len(sequences) == 1 and smaller < MIN_PREFILL_TOKENS:
                return False
            self._prefill_tokens = max(1, smaller)
            for chunk in work:  # what was to be computed is not
                self.pool.invalidate(chunk.sequence.pages[chunk.start // self.pool.page_size :])
        if not smaller:
            return False
        for sequence in reversed(sequences):
            if sequence.slot >= 0 and not sequence.finished:
                self._requeue(sequence)
        self._ending = [sequence for sequence in self._ending if sequence.slot >= 0]
        self.pool.launched()
        return True

    def fail(self, sequence: Sequence) -> None:
        """A sequence whose work never ran leaves."""
        sequence.finished = True
        if sequence is self._partial_sequence:
            self._partial_sequence = None
        self.pool.invalidate(sequence.pages)
        self._ending = [other for other in self._ending if other is not sequence]
        self._release(sequence)
        self.pool.launched()

    def abort_all(self) -> None:
        """Every sequence leaves, waiting or active."""
        self._release_ended()
        self._partial_sequence = None
        for sequence in self._sequences:
            if sequence is not None:
                self._release(sequence)
        self.pool.launched()
        self.queue = WaitingQueue()

    def check(self) -> None:
        """Raises AssertionError where pages have leaked or are held by mistake."""
        self.pool.check(
            [sequence.pages for sequence in self._sequences if sequence is not None]
            + [[p] for p in self.pool.copy_sources]
        )

    def _max_active(self) -> int:
        """As many as the device takes; of the last sequences, if it is known how long they get, as many as let the
        short ones last as long as the longest. All at once, they would soon be gone and leave it to steps of a few
        sequences."""
        if not (self.no_more_requests and self.output_lengths.certain):
            return self._max_sequences
        slots = np.flatnonzero(self._occupied)
        left = self._final_lens[slots] - self._seq_lens[slots]
        tokens = self.queue.new_tokens + int(left.sum())
        longest = max(self.queue.longest, int(left.max(initial=1)))
        even = math.ceil(EVEN_SLACK * tokens / longest / EVEN_STEP) * EVEN_STEP
        return min(self._max_sequences, max(EVEN_SEQUENCES, even))

    def _spare_pages(self) -> int:
        """Pages that no active sequence is expected to need."""
        slots = np.flatnonzero(self._occupied)
        generated = self._seq_lens[slots] + 1 - self._prompt_lens[slots]
        limits = self._final_lens[slots] + 1 - self._prompt_lens[slots]
        final = self._prompt_lens[slots] + self.output_lengths.expect(limits, generated) - 1
        missing = -(-final // self.pool.page_size) - self._num_pages[slots]
        return self.pool.available - int(np.maximum(missing, 0).sum())

    def _pages_needed(self, sequence: Sequence, match: PrefixMatch) -> int:
        """Pages that `available` loses by admitting the sequence and running it to its expected end."""
        prompt, generated = len(sequence.request.token_ids), len(sequence.output)
        limit = sequence.request.max_new_tokens
        new = int(self.output_lengths.expect(np.array([limit], np.int32), np.array([generated], np.int32))[0])
        tokens = max(prompt + new - 1, len(sequence.prompt))
        copy_from = [match.copy_from] if match.copied else []
        return (
            self.pool.pages_for(tokens)
            - len(match.pages)
            + self.pool.num_evictable([*match.pages, *copy_from])
        )

    def _admit(self, sequence: Sequence, match: PrefixMatch, start: int, tokens: int) -> PrefillChunk:
        first = sequence.admission < 0
        self._admissions += 1
        slot = sequence.slot = self._free_slots.pop()
        sequence.admission, sequence.request.waiting = self._admissions, False
        self._sequences[slot], self._occupied[slot] = sequence, True
        self._prompt_lens[slot], self._final_lens[slot] = len(sequence.request.token_ids), sequence.final_len
        self._seq_lens[slot], self._admitted[slot], self._num_pages[slot] = 0, sequence.admission, 0
        self.pool.share(match.pages)
        if match.copied:
            self.pool.keep_copy_source(match.copy_from)
        own = self.pool.allocate(self.pool.pages_for(len(sequence.prompt)) - len(match.pages))
        sequence.pages = []
        self._extend(slot, [*match.pages, *own])
        if first:
            self.prompt_tokens += len(sequence.prompt)
            self.shared_tokens += start
        return self._chunk(sequence, start, tokens, match.copy_from, match.copied)

    def _chunk(
        self, sequence: Sequence, start: int, tokens: int, copy_from: int = NULL_PAGE, copied: int = 0
    ) -> PrefillChunk:
        stop = min(len(sequence.prompt), start + tokens)
        self.pool.insert(sequence.prompt, sequence.pages, start, stop, sequence.root)
        sequence.computed_tokens = stop
        self._seq_lens[sequence.slot] = stop
        copy_to = sequence.pages[start // self.pool.page_size] if copied else NULL_PAGE
        chunk = PrefillChunk(sequence, start, stop, copy_from, copy_to, copied)
        if not chunk.complete:
            self._partial_sequence = sequence
        elif sequence.final_len == stop:
            self._end(sequence.slot)
        else:
            self._decoding[sequence.slot] = True
            self._prompt_order.add(sequence.slot, sequence.prompt, sequence.root)
        return chunk

    def _missing_pages(self, slots: NDArray[np.intp] | Ints, steps: int) -> Ints:
        """Pages that each sequence lacks for `steps` more tokens, or for its last."""
        target_lens = np.minimum(self._seq_lens[slots] + steps, self._final_lens[slots])
        return np.maximum(-(-target_lens // self.pool.page_size) - self._num_pages[slots], 0)

    def _extend(self, slot: int, pages: list[int]) -> None:
        sequence, num_pages = self._sequences[slot], int(self._num_pages[slot])
        assert sequence is not None
        sequence.pages += pages
        self._block_tables[slot, num_pages : num_pages + len(pages)] = pages
        self._num_pages[slot] += len(pages)

    def _preempt(self) -> None:
        """The youngest sequence goes back to the queue. The oldest never leaves, so that the run goes on."""
        slots = np.flatnonzero(self._decoding)
        sequence = self._sequences[slots[self._admitted[slots].argmax()]]
        assert sequence is not None
        self._requeue(sequence)
        self.preemptions += 1

    def _requeue(self, sequence: Sequence) -> None:
        if sequence is self._partial_sequence:
            self._partial_sequence = None
        self._release(sequence)
        sequence.prompt = np.concatenate(
            [sequence.request.token_ids, np.array(sequence.output, np.int32)]
        ).astype(np.int32)
        sequence.computed_tokens = 0
        self.queue.push_front(sequence)

    def _end(self, slot: int) -> None:
        """No step after the coming one is needed; what the sequence holds is, until that one has been handed over."""
        sequence = self._sequences[slot]
        assert sequence is not None
        self._stop_decoding(slot)
        self._ending.append(sequence)

    def _stop_decoding(self, slot: int) -> None:
        self._decoding[slot] = False
        self._prompt_order.remove(slot)

    def _release_ended(self) -> None:
        for sequence in self._ending:
            self._release(sequence)
        self._ending.clear()

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.pages)
        self._stop_decoding(sequence.slot)
        self._occupied[sequence.slot] = False
        self._sequences[sequence.slot] = None
        self._free_slots.append(sequence.slot)
        sequence.slot, sequence.pages = -1, []
