"""The model on the device: prefill and decode batches over the pool, as CUDA graphs where there are any."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from batchrun.engine.paged.attention import devices
from batchrun.engine.paged.attention.cascade import MAX_ITEMS
from batchrun.engine.paged.attention.metadata import AttentionMetadata
from batchrun.engine.paged.attention.operator import KVCache, forward_context
from batchrun.engine.paged.device.graphs import DecodeGraphs, Graph
from batchrun.engine.paged.device.last_layer import LastLayer
from batchrun.engine.paged.device.pending import Mark, Pending
from batchrun.engine.paged.device.sampler import INVALID_TOKEN, Sampler
from batchrun.engine.paged.device.scored_chunks import ScoredChunks
from batchrun.engine.paged.device.shapes import (
    Inputs,
    Shape,
    bucket,
    input_size,
    item_bucket,
    power_of_two,
)
from batchrun.engine.paged.device.work import DecodeWork, PrefillWork, Starts, Work
from batchrun.engine.paged.schedule.batches import DecodeBatch, PrefillChunk
from batchrun.engine.paged.schedule.page_pool import NULL_PAGE
from batchrun.engine.paged.schedule.sequence import Sequence
from batchrun.engine.protocol import Request
from batchrun.engine.tokens import row_sampling
from batchrun.engine.tokens.answer_mask import AnswerMask
from batchrun.engine.tokens.scoring import ScoringHead
from batchrun.engine.tokens.token_values import ValuesOfTokens
from batchrun.engine.weights.row_adapters import TokenAdapters

NO_TOKEN = -1
"""In place of a token that a sequence no longer wanted."""

SETTLED = -3
"""`SETTLED - token` is a token behind which just one ending is left, see `AnswerMask.rest`: the sequence ends there."""

NARROW_BATCH = 128

Launch = Callable[[Work, Callable[[Work], Pending]], Pending]
"""Has every rank run a batch, this one by the function that it is given."""


class Runner:
    """Sequences have slots: their last tokens, lengths and whether they run stay on the device, read a round later."""

    def __init__(
        self,
        model: nn.Module,
        cache: KVCache,
        sampler: Sampler,
        stop_token_ids: list[int],
        max_sequences: int,
        max_context: int,
        decode_steps: int,
        device: torch.device,
        values_of_tokens: ValuesOfTokens,
        launch: Launch | None = None,
        mark_progress: Callable[[], None] | None = None,
    ) -> None:
        self.cache = cache
        self.computed_tokens = 0
        self.launches = 0
        self._model, self._sampler, self.device = model, sampler, device
        self._everywhere, self._mark_progress = launch, mark_progress
        self._last_layer = LastLayer(model, cache.modules)
        self._scoring = ScoringHead(model)
        self._graphs = DecodeGraphs(device)
        self._use_graphs = devices.is_gpu(device)
        self._max_pages = 1
        self._null_slot = max_sequences
        slots = max_sequences + 1

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._last_token = zeros(torch.long, slots)
        self._seq_len = zeros(torch.long, slots)
        self._final_len = zeros(torch.long, slots)
        self._prompt_len = zeros(torch.long, slots)
        self._seed = zeros(torch.long, slots)
        self._running = zeros(torch.bool, slots)
        self._stops = torch.tensor(list(stop_token_ids), dtype=torch.long, device=device)
        self._step = zeros(torch.long, 1)
        self._values_of_tokens = values_of_tokens
        # A step is for as many sequences as its shape says, which may be more than there can be.
        widest = max(slots, bucket(max_sequences))
        self._sampled = zeros(torch.int32, decode_steps, widest)
        # Captured steps read it, so it is as large as it can ever be from the start.
        pages = power_of_two(-(-max_context // cache.page_size))
        self._largest_shape = Shape(bucket(max_sequences), pages)
        self._inputs = zeros(torch.int32, input_size(Shape(bucket(max_sequences), pages, MAX_ITEMS)))
        self._cascade = cache.cascade_planner(prefills=False)
        self._prefill_cascade = cache.cascade_planner(prefills=True)
        vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        self._seen = zeros(torch.bool, slots, vocabulary) if sampler.penalizes else None
        self._states = zeros(torch.int32, slots) if sampler.mask is not None else None
        self._adapters = TokenAdapters.of(model)
        self._adapter = None if self._adapters is None else zeros(torch.int32, slots)
        self._own = zeros(torch.float32, slots, row_sampling.WIDTH) if sampler.has_own else None
        # Like `_sampled`, of every step of a decode batch.
        self._values = {
            name: zeros(one.dtype, decode_steps, widest, *one.shape[1:])
            for name, one in values_of_tokens.compute(
                zeros(torch.float32, 1, vocabulary), zeros(torch.long, 1)
            ).items()
        }
        self._true = torch.ones((), dtype=torch.bool, device=device)

    @property
    def mask(self) -> AnswerMask | None:
        """What answers are kept to."""
        return self._sampler.mask

    def prefill(self, chunks: list[PrefillChunk]) -> Pending:
        """Computes a prefill batch; gives the first new token of every sequence that it completes."""
        work, sequences = PrefillWork.of(chunks, self.cache.page_size, self._sampler, self.cache.widens_pages)
        if self._prefill_cascade is not None:
            work = work.planned(self._prefill_cascade, self.cache.page_size)
        return replace(self._launch(work), sequences=sequences, scored=work.scored)

    def decode(self, batch: DecodeBatch) -> Pending:
        """Runs a decode batch and gives its tokens."""
        plan = None if self._cascade is None else self._cascade.plan(batch)
        return replace(self._launch(DecodeWork.of(batch, plan)), sequences=batch.sequences)

    def _launch(self, work: Work) -> Pending:
        return self.run(work) if self._everywhere is None else self._everywhere(work, self.run)

    @torch.no_grad()
    def run(self, work: Work) -> Pending:
        """What every rank does for a batch. Its results have no names of sequences."""
        self.launches += 1
        return self._decode(work) if isinstance(work, DecodeWork) else self._prefill(work)

    def _prefill(self, work: PrefillWork) -> Pending:
        if work.copies is not None:
            self.cache.copy_pages(*(self._to_device(row, np.int64) for row in work.copies))
        metadata = work.metadata(self._to_device)
        if self._adapters is not None:
            self._choose_adapters(self._to_device(np.repeat(work.adapters, work.query_lens), np.int32))
        self.computed_tokens += len(work.tokens)
        starts = work.starts
        logits_to_keep = self._to_device([0] if starts is None else starts.last_tokens, np.int64)
        token_ids, position_ids = (
            self._to_device(work.tokens, np.int64),
            self._to_device(work.positions, np.int64),
        )
        began, logprobs = self._mark(), None
        if work.scored is not None:
            logits, logprobs = self._score(token_ids, position_ids, metadata, logits_to_keep, work.scored)
        else:
            logits = self._forward(token_ids, position_ids, metadata, logits_to_keep)
        if starts is None:
            nothing = torch.empty(1, 0, dtype=torch.int32)
            return Pending([], nothing, began, self._mark(), logprobs=logprobs)
        token = self._start(starts, logits)
        values = {
            name: column[None]
            for name, column in self._values_of_tokens.compute(logits, token.long()).items()
        }
        return replace(self._to_host(token[None], began, values), logprobs=logprobs)

    def _decode(self, work: DecodeWork) -> Pending:
        shape = self._shape(work)
        step = self._graph(shape) if self._use_graphs else None
        self._upload(shape, work)
        began = self._mark()
        for _ in range(work.steps):
            if step is None:
                self._decode_step(shape)
            else:
                step.replay()
            if self._mark_progress is not None:
                self._mark_progress()
        self.computed_tokens += shape.batch_size * work.steps
        values = {name: column[: work.steps, : shape.batch_size] for name, column in self._values.items()}
        return self._to_host(self._sampled[: work.steps, : shape.batch_size], began, values)

    def _shape(self, work: DecodeWork) -> Shape:
        """Few different shapes. The width matters only to few sequences, whose pages are split over several blocks."""
        (batch_size, pages), plan = work.block_tables.shape, work.plan
        self._max_pages = max(self._max_pages, pages)
        return Shape(
            batch_size=bucket(batch_size),
            pages=power_of_two(pages if batch_size <= NARROW_BATCH else self._max_pages),
            items=0 if plan is None else item_bucket(len(plan.items)),
            block_queries=0 if plan is None else plan.block_queries,
        )

    @torch.no_grad()
    def warm_up(self, prefill_tokens: int) -> None:
        """Runs the largest prefill batch and the largest decode step that may come, on the null page and slot.

        Nothing of it is kept but what was compiled: it is for finding out how much memory that takes.
        """
        num_sequences = min(self._null_slot, prefill_tokens)
        prompt = np.zeros(prefill_tokens // num_sequences, np.int32)
        chunks = []
        for number in range(num_sequences):
            sequence = Sequence.of(Request(number, prompt, max_new_tokens=1))
            sequence.slot, sequence.pages = (
                self._null_slot,
                [NULL_PAGE] * -(-len(prompt) // self.cache.page_size),
            )
            chunks.append(PrefillChunk(sequence, 0, len(prompt)))
        self.run(
            PrefillWork.of(chunks, self.cache.page_size, self._sampler, self.cache.widens_pages)[0]
        ).read()
        self._graph(self._largest_shape)
        self._graphs.clear()
        self.computed_tokens = self.launches = 0

    def _graph(self, shape: Shape) -> Graph:
        """The captured decode step of a shape; captured, on sequences of the null slot, when it is first wanted."""
        graph = self._graphs.find(shape, self.cache.memory)
        if graph is None:
            self._upload(shape)
            graph = self._graphs.capture(shape, lambda: self._decode_step(shape))
        return graph

    def _upload(self, shape: Shape, work: DecodeWork | None = None) -> None:
        """One copy for all that a decode batch needs, laid out as `Inputs` reads it; the null slot without one."""
        flat = torch.full((input_size(shape),), NULL_PAGE, dtype=torch.int32)
        inputs = Inputs.of(flat, shape)
        inputs.slots.fill_(self._null_slot)
        if work is not None:
            rows, pages = work.block_tables.shape
            inputs.slots.numpy()[:rows] = work.slots
            inputs.block_tables.numpy()[:rows, :pages] = work.block_tables
        if work is not None and (plan := work.plan) is not None:
            inputs.starts.numpy()[: len(plan.starts)] = plan.starts
            inputs.members.numpy()[: len(plan.members)] = plan.members
            inputs.items.numpy()[: len(plan.items)] = plan.items
        self._inputs[: len(flat)].copy_(self._pin(flat), non_blocking=True)
        self._step.zero_()

    def _decode_step(self, shape: Shape) -> None:
        """One token for each sequence that still runs; runs under capture, so nothing is read back."""
        inputs = Inputs.of(self._inputs[: input_size(shape)], shape)
        slots, block_tables = inputs.slots.long(), inputs.block_tables
        shared = inputs.shared_prefixes(shape)
        size = self.cache.page_size
        running, seq_len = self._running[slots], self._seq_len[slots]
        # A sequence that has ended attends to as little as there can be, and writes to the null page.
        position = torch.where(running, seq_len, 0 if shared is None else shared.starts)
        page = block_tables.gather(1, (position // size)[:, None])[:, 0]
        page = torch.where(running, page, NULL_PAGE)
        metadata = AttentionMetadata(
            slot_mapping=page.long() * size + position % size,
            block_tables=block_tables,
            seq_lens=(position + 1).int(),
            shared_prefixes=shared,
        )
        if self._adapter is not None:
            self._choose_adapters(self._adapter[slots])
        logits = self._forward(self._last_token[slots], position, metadata, 0)
        seen = None if self._seen is None else self._seen[slots]
        states = None if self._states is None else self._states[slots]
        own = None if self._own is None else self._own[slots]
        generated = seq_len + 1 - self._prompt_len[slots]
        token = self._sampler.sample(logits, self._seed[slots], generated, seen, own, states)
        told, goes_on = self._follow(slots, token, states)
        self._sampled[:, : shape.batch_size].index_copy_(
            0, self._step, torch.where(running, told, NO_TOKEN).int()[None]
        )
        for name, column in self._values_of_tokens.compute(logits, token).items():
            self._values[name][:, : shape.batch_size].index_copy_(0, self._step, column[None])
        self._step += 1
        seq_len = torch.where(running, seq_len + 1, seq_len)
        self._seq_len[slots] = seq_len
        running = running if goes_on is None else running & goes_on
        self._update(slots, token, running & self._continues(token, seq_len, self._final_len[slots]))

    def _start(self, starts: Starts, logits: Tensor) -> Tensor:
        """Puts sequences whose prompts are computed into their slots and chooses their first tokens."""
        slots, seq_len, final_len, prompt_len, seed = (
            self._to_device(numbers, np.int64)
            for numbers in (
                starts.slots,
                starts.seq_lens,
                starts.final_lens,
                starts.prompt_lens,
                starts.seeds,
            )
        )
        seen = own = states = None
        if self._seen is not None and starts.seen_slots is not None and starts.seen_tokens is not None:
            self._seen[slots] = False
            seen_slots = self._to_device(starts.seen_slots, np.int64)
            self._seen[seen_slots, self._to_device(starts.seen_tokens, np.int64)] = True
            seen = self._seen[slots]
        if self._own is not None and starts.own is not None:
            own = self._to_device(starts.own, np.float32)
            self._own[slots] = own
        if self._adapter is not None:
            self._adapter[slots] = self._to_device(starts.adapters, np.int32)
        if starts.states is not None:
            states = self._to_device(starts.states, np.int32)
        token = self._sampler.sample(logits, seed, seq_len - prompt_len, seen, own, states)
        self._seq_len[slots], self._final_len[slots] = seq_len, final_len
        self._prompt_len[slots], self._seed[slots] = prompt_len, seed
        told, goes_on = self._follow(slots, token, states)
        continues = self._continues(token, seq_len, final_len)
        self._update(slots, token, continues if goes_on is None else continues & goes_on)
        return told.int()

    def _follow(self, slots: Tensor, token: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Moves answers of a form on by a token, from their `states`. Gives tokens as they are told to the host, and
        whose rest is open."""
        if states is None or self._states is None or self._sampler.mask is None:
            return token, None
        mask = self._sampler.mask
        self._states[slots] = states = mask.advance(states, token.clamp(min=0))
        settled = mask.settled.index_select(0, states) & (token >= 0)
        return torch.where(settled, SETTLED - token, token), ~settled

    def _continues(self, token: Tensor, seq_len: Tensor, final_len: Tensor) -> Tensor:
        continues = (token != INVALID_TOKEN) & (seq_len < final_len)
        return continues & ~torch.isin(token, self._stops) if len(self._stops) else continues

    def _update(self, slots: Tensor, token: Tensor, running: Tensor) -> None:
        token = token.clamp(min=0)
        self._last_token[slots] = token
        self._running[slots] = running
        if self._seen is not None:
            self._seen.index_put_((slots, token), self._true)  # a plain True comes from the host

    def _choose_adapters(self, tokens: Tensor) -> None:
        """Has the coming model call use these adapters: (tokens,) int32."""
        if self._adapters is not None:
            torch._dynamo.mark_dynamic(tokens, 0)
            self._adapters.tokens = tokens

    def _score(
        self,
        tokens: Tensor,
        positions: Tensor,
        metadata: AttentionMetadata,
        logits_to_keep: Tensor,
        scored: ScoredChunks,
    ) -> tuple[Tensor, Tensor]:
        """Logits as `_forward` gives them, and the scored tokens' log probabilities on their way to the host."""
        columns, places = self._to_device(scored.columns, np.int64), self._to_device(scored.places, np.int64)
        wanted = self._to_device(scored.tokens, np.int64)
        with self._scoring.states(0, columns) as states:
            needed = torch.cat([logits_to_keep, columns])
            logits = self._forward(tokens, positions, metadata, logits_to_keep, needed)
        with self._sampler.whole_logits():
            logprobs = self._scoring.logprobs(states[0], wanted, places, scored.places)
        return logits, self._copied(logprobs)

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        metadata: AttentionMetadata,
        logits_to_keep: Tensor | int,
        needed: Tensor | None = None,
    ) -> Tensor:
        """Logits (sequences, vocabulary): of all tokens with `logits_to_keep` 0, else of those that it points at.
        `needed` are the tokens whose last hidden states count, where they are more than these."""
        needed = logits_to_keep if needed is None and isinstance(logits_to_keep, Tensor) else needed
        with (
            forward_context(self.cache, metadata),
            nullcontext() if needed is None else self._last_layer.only(needed),
        ):
            logits: Tensor = self._model(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=logits_to_keep,
            ).logits[0]
            return logits

    def _to_host(self, tokens: Tensor, began: Mark, values: dict[str, Tensor]) -> Pending:
        tokens = self._copied(tokens)
        values = {name: self._copied(column) for name, column in values.items()}
        return Pending([], tokens, began, self._mark(), values)

    def _copied(self, tensor: Tensor) -> Tensor:
        """On its way to the host; there once the device has come so far."""
        if not devices.is_gpu(self.device):
            return tensor.clone()
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)

    def _mark(self) -> Mark:
        if not devices.is_gpu(self.device):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _to_device(self, values: list[int] | NDArray[Any], dtype: type) -> Tensor:
        return self._pin(torch.from_numpy(np.asarray(values, dtype))).to(self.device, non_blocking=True)

    def _pin(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if devices.is_gpu(self.device) else tensor
