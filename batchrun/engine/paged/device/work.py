"""What the device is to do, as arrays: made by the scheduler's process, run alike on every rank."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from batchrun.engine.paged.attention.cascade import CascadePlan, CascadePlanner
from batchrun.engine.paged.attention.metadata import AttentionMetadata, PrefillTurn, SharedPrefixes, Spans
from batchrun.engine.paged.attention.widened_pages import WidenedPages
from batchrun.engine.paged.device.sampler import Sampler
from batchrun.engine.paged.device.scored_chunks import ScoredChunks
from batchrun.engine.paged.device.shapes import length_kind, query_spans, round_tokens
from batchrun.engine.paged.schedule.batches import DecodeBatch, Ints, PrefillChunk
from batchrun.engine.paged.schedule.page_pool import NULL_PAGE
from batchrun.engine.paged.schedule.scheduler import MIN_PREFILL_TOKENS
from batchrun.engine.paged.schedule.sequence import Sequence
from batchrun.engine.tokens import row_sampling
from batchrun.engine.tokens.noise import signed

Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Starts:
    """Sequences whose prompts a prefill batch completes, and what their slots are to hold.

    `last_tokens` are the places of their last tokens in the batch; all (sequences,) int64. `adapters` (sequences,)
    int32 are the numbers of their adapters, 0 for none. `seen_slots` and
    `seen_tokens` are every token so far, of which slot, where repetition is penalized; `own` (sequences, WIDTH)
    float32 their own numbers for sampling, `states` (sequences,) int32 where in the mask's automaton they begin.
    """

    last_tokens: Longs
    slots: Longs
    seq_lens: Longs
    final_lens: Longs
    prompt_lens: Longs
    seeds: Longs
    adapters: Ints
    seen_slots: Longs | None
    seen_tokens: Longs | None
    own: NDArray[np.float32] | None
    states: Ints | None

    @classmethod
    def of(
        cls, sequences: Many[Sequence], stops: list[int], last_tokens: list[int], sampler: Sampler
    ) -> Self:
        """Of sequences that have so many tokens, `stops`, once the batch is computed."""

        def longs(values: list[int]) -> Longs:
            return np.array(values, np.int64)

        slots = longs([one.slot for one in sequences])
        seen_slots = seen_tokens = own = states = None
        if sampler.penalizes and sequences:
            seen_slots = np.repeat(slots, [len(one.prompt) for one in sequences])
            seen_tokens = np.concatenate([one.prompt for one in sequences]).astype(np.int64)
        if sampler.has_own:
            numbers = row_sampling.numbers_of([one.request for one in sequences], sampler.sampling)
            own = np.array(numbers, np.float32)
        if sampler.mask is not None:
            answers = [one.prompt[len(one.request.token_ids) :] for one in sequences]
            states = np.asarray(sampler.mask.begin([one.request for one in sequences], answers), np.int32)
        return cls(
            last_tokens=longs(last_tokens),
            slots=slots,
            seq_lens=longs(stops),
            final_lens=longs([one.final_len for one in sequences]),
            prompt_lens=longs([len(one.request.token_ids) for one in sequences]),
            seeds=longs([signed(one.request.row_seed) for one in sequences]),
            adapters=np.array([one.request.adapter for one in sequences], np.int32),
            seen_slots=seen_slots,
            seen_tokens=seen_tokens,
            own=own,
            states=states,
        )


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """A prefill batch: `copies` (3, copies) int64 are pages to copy first, from where, to where and how many tokens;
    the others are as in `AttentionMetadata`, `tokens` and `positions` (tokens,) int64; `widened` are the pages to be
    brought back to the model's format, turn by turn, if any are. Long chunks come first and padding last.
    `adapters` (sequences,) int32 are numbers of adapters, 0 for none. `scored` has no names of sequences. `plans`: what
    sequences of each turn read together; there is one turn where no pages are widened."""

    copies: Longs | None
    tokens: Longs
    positions: Longs
    slot_mapping: Longs
    block_tables: Ints
    query_lens: Longs
    seq_lens: Longs
    query_spans: Spans
    no_context: bool
    widened: WidenedPages | None
    adapters: Ints
    starts: Starts | None
    scored: ScoredChunks | None
    plans: Many[CascadePlan | None]

    @classmethod
    def of(
        cls, chunks: list[PrefillChunk], page_size: int, sampler: Sampler, widens: bool
    ) -> tuple[Self, list[Sequence]]:
        """The batch, and the sequences whose first new tokens come out of it."""
        no_context = not any(chunk.start for chunk in chunks)
        if widens and not no_context:
            # Those with the same pages side by side, so that these are brought back in few turns.
            chunks = sorted(chunks, key=lambda c: (-length_kind(c.stop - c.start), c.sequence.pages))
        else:
            chunks = sorted(chunks, key=lambda c: c.start - c.stop)
        copies = [(chunk.copy_from, chunk.copy_to, chunk.copied) for chunk in chunks if chunk.copied]
        query_lens = [s.stop - s.start for s in chunks]
        # Padding, up to one of few numbers of tokens, belongs to a sequence of its own on the null page.
        padding = round_tokens(sum(query_lens)) - sum(query_lens)
        query_lens.append(padding)
        positions = np.concatenate([*(np.arange(s.start, s.stop) for s in chunks), np.arange(padding)])
        tokens = np.concatenate(
            [*(s.sequence.prompt[s.start : s.stop] for s in chunks), np.zeros(padding, np.int32)]
        )
        width = max(-(-padding // page_size), *(len(s.sequence.pages) for s in chunks))
        block_tables = np.full((len(query_lens), width), NULL_PAGE, np.int32)
        for number, chunk in enumerate(chunks):
            block_tables[number, : len(chunk.sequence.pages)] = chunk.sequence.pages
        seq_ids = np.repeat(np.arange(len(query_lens)), query_lens)
        pages = block_tables[seq_ids, positions // page_size].astype(np.int64)
        ends = np.cumsum(query_lens)
        completed = [
            i for i, one in enumerate(chunks) if one.complete and one.sequence.request.scored is None
        ]
        sequences = [chunks[i].sequence for i in completed]
        stops, last_tokens = [chunks[i].stop for i in completed], [int(ends[i]) - 1 for i in completed]
        seq_lens = np.array([*(s.stop for s in chunks), padding], np.int64)
        spans, widened = query_spans(query_lens), None
        if widens and not no_context:
            widened = WidenedPages.of(spans, block_tables, query_lens, seq_lens, page_size)
        work = cls(
            copies=np.array(copies, np.int64).T.copy() if copies else None,
            tokens=tokens.astype(np.int64),
            positions=positions.astype(np.int64),
            slot_mapping=pages * page_size + positions % page_size,
            block_tables=block_tables,
            query_lens=np.array(query_lens, np.int64),
            seq_lens=seq_lens,
            query_spans=spans,
            no_context=no_context,
            widened=widened,
            adapters=np.array([*(s.sequence.request.adapter for s in chunks), 0], np.int32),
            starts=Starts.of(sequences, stops, last_tokens, sampler) if sequences else None,
            scored=ScoredChunks.of(chunks, np.concatenate([[0], ends])),
            plans=[None] * (1 if widened is None else len(widened.spans)),
        )
        return work, sequences

    @property
    def smaller(self) -> dict[str, int] | None:
        """Engine options under which no prefill batch is so large; None where one sequence has no room to be split."""
        half = int(self.query_lens[:-1].sum()) // 2
        splits = half >= MIN_PREFILL_TOKENS or (half and len(self.query_lens) > 2)
        return {"prefill_tokens": half} if splits else None

    def planned(self, cascade: CascadePlanner, page_size: int) -> Self:
        """The batch with what its sequences read together, if that is anything."""
        if self.no_context:
            return self
        plans = [
            cascade.plan_prefill(
                self.block_tables, self.query_lens, self.seq_lens, page_size, spans[0][0], spans[-1][1]
            )
            for spans in self._turns
        ]
        return replace(self, plans=plans)

    @property
    def _turns(self) -> list[Spans]:
        return [self.query_spans] if self.widened is None else self.widened.spans

    def metadata(self, upload: Callable[[NDArray[Any], type], Tensor]) -> AttentionMetadata:
        """What attention is told of it, on the device."""

        def ints(values: NDArray[Any]) -> Tensor:
            return upload(values, np.int32)

        pages = [None] if self.widened is None else [upload(own, np.int64) for own in self.widened.pages]
        shared = [None if plan is None else SharedPrefixes.of(plan, ints) for plan in self.plans]
        turns = zip(self._turns, shared, pages, strict=True)
        return AttentionMetadata(
            slot_mapping=upload(self.slot_mapping, np.int64),
            block_tables=ints(self.block_tables if self.widened is None else self.widened.block_tables),
            seq_lens=ints(self.seq_lens),
            cu_seqlens_q=ints(np.concatenate([[0], np.cumsum(self.query_lens)])),
            turns=[PrefillTurn(*turn) for turn in turns],
            no_context=self.no_context,
        )

    def for_ranks(self) -> Self:
        """As other ranks get it: they need not know whose scored tokens are which."""
        return self if self.scored is None else replace(self, scored=replace(self.scored, parts=[]))


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """A decode batch, see `DecodeBatch`, without its sequences' names, and which of their prefixes are read once."""

    slots: Ints
    block_tables: Ints
    steps: int
    plan: CascadePlan | None

    @classmethod
    def of(cls, batch: DecodeBatch, plan: CascadePlan | None) -> Self:
        """The batch as arrays of its own, which nobody changes later."""
        return cls(batch.slots, batch.block_tables, batch.steps, plan)

    @property
    def smaller(self) -> dict[str, int] | None:
        """Engine options under which no decode batch has so many sequences; None where it has one."""
        half = len(self.slots) // 2
        return {"max_rows": half} if half else None

    def for_ranks(self) -> Self:
        """As other ranks get it."""
        return self


Work = PrefillWork | DecodeWork
