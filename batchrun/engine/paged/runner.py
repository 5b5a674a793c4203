"""The model on the device: prefill and decode batches over the pool, as CUDA graphs where there are any."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from batchrun.engine import row_sampling
from batchrun.engine.noise import signed
from batchrun.engine.paged import devices
from batchrun.engine.paged.attention import KVCache, forward_context
from batchrun.engine.paged.batches import DecodeBatch, PrefillChunk
from batchrun.engine.paged.cascade import MAX_ITEMS, CascadePlan
from batchrun.engine.paged.graphs import DecodeGraphs, Graph
from batchrun.engine.paged.last_layer import LastLayer
from batchrun.engine.paged.metadata import AttentionMetadata, SharedPrefixes
from batchrun.engine.paged.page_pool import NULL_PAGE
from batchrun.engine.paged.pending import Mark, Pending
from batchrun.engine.paged.queue import Sequence
from batchrun.engine.paged.sampler import INVALID_TOKEN, Sampler
from batchrun.engine.paged.scored_chunks import ScoredChunks
from batchrun.engine.paged.shapes import (
    Inputs,
    Shape,
    bucket,
    input_size,
    item_bucket,
    power_of_two,
    query_spans,
    round_tokens,
)
from batchrun.engine.protocol import Request
from batchrun.engine.row_adapters import TokenAdapters
from batchrun.engine.scoring import ScoringHead
from batchrun.engine.token_values import ValuesOfTokens

NO_TOKEN = -1
"""In place of a token that a sequence no longer wanted."""

SETTLED = -3
"""`SETTLED - token` is a token behind which just one ending is left, see `AnswerMask.rest`: the sequence ends there."""

NARROW_BATCH = 128


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
    ) -> None:
        self.cache = cache
        self.computed_tokens = 0
        self.launches = 0
        self._model, self._sampler, self._device = model, sampler, device
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
        self._cascade = cache.cascade_planner()
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

    @torch.no_grad()
    def prefill(self, chunks: list[PrefillChunk]) -> Pending:
        """Computes a prefill batch; gives the first new token of every sequence that it completes."""
        size = self.cache.page_size
        chunks = sorted(chunks, key=lambda chunk: chunk.start - chunk.stop)
        copies = [chunk for chunk in chunks if chunk.copied]
        if copies:
            self.cache.copy_pages(
                self._to_device([s.copy_from for s in copies], np.int64),
                self._to_device([s.copy_to for s in copies], np.int64),
                self._to_device([s.copied for s in copies], np.int64),
            )
        query_lens = [s.stop - s.start for s in chunks]
        # Padding, up to one of few numbers of tokens, belongs to a sequence of its own on the null page.
        padding = round_tokens(sum(query_lens)) - sum(query_lens)
        query_lens.append(padding)
        seq_lens = [*(s.stop for s in chunks), padding]
        positions = np.concatenate([*(np.arange(s.start, s.stop) for s in chunks), np.arange(padding)])
        tokens = np.concatenate(
            [*(s.sequence.prompt[s.start : s.stop] for s in chunks), np.zeros(padding, np.int32)]
        )
        width = max(-(-padding // size), *(len(s.sequence.pages) for s in chunks))
        block_tables = np.full((len(query_lens), width), NULL_PAGE, np.int32)
        for number, chunk in enumerate(chunks):
            block_tables[number, : len(chunk.sequence.pages)] = chunk.sequence.pages
        seq_ids = np.repeat(np.arange(len(query_lens)), query_lens)
        slot_mapping = block_tables[seq_ids, positions // size].astype(np.int64) * size + positions % size
        cu_seqlens_q = np.concatenate([[0], np.cumsum(query_lens)])
        scored = ScoredChunks.of(chunks, cu_seqlens_q)
        completed = [
            i for i, chunk in enumerate(chunks) if chunk.complete and chunk.sequence.request.scored is None
        ]
        sequences = [chunks[i].sequence for i in completed]
        metadata = AttentionMetadata(
            slot_mapping=self._to_device(slot_mapping, np.int64),
            block_tables=self._to_device(block_tables, np.int32),
            seq_lens=self._to_device(seq_lens, np.int32),
            cu_seqlens_q=self._to_device(cu_seqlens_q, np.int32),
            cu_seqlens_k=self._to_device(np.concatenate([[0], np.cumsum(seq_lens)]), np.int32),
            max_seqlen_q=max(query_lens),
            max_seqlen_k=max(seq_lens),
            query_spans=query_spans(query_lens),
            no_context=all(s.start == 0 for s in chunks),
        )
        if self._adapters is not None:
            adapters = [chunk.sequence.request.adapter for chunk in chunks]
            self._choose_adapters(self._to_device(np.repeat([*adapters, 0], query_lens), np.int32))
        self.computed_tokens += len(tokens)
        self.launches += 1
        logits_to_keep = self._to_device([cu_seqlens_q[i + 1] - 1 for i in completed] or [0], np.int64)
        token_ids, position_ids = self._to_device(tokens, np.int64), self._to_device(positions, np.int64)
        began = self._mark()
        if scored is not None:
            logits, logprobs = self._score(token_ids, position_ids, metadata, logits_to_keep, scored)
        else:
            logits, logprobs = self._forward(token_ids, position_ids, metadata, logits_to_keep), None
        if not sequences:
            nothing = torch.empty(1, 0, dtype=torch.int32)
            return Pending([], nothing, began, self._mark(), scored=scored, logprobs=logprobs)
        token = self._start(sequences, [chunks[i].stop for i in completed], logits)
        values = {
            name: column[None]
            for name, column in self._values_of_tokens.compute(logits, token.long()).items()
        }
        return replace(self._to_host(sequences, token[None], began, values), scored=scored, logprobs=logprobs)

    @torch.no_grad()
    def decode(self, batch: DecodeBatch) -> Pending:
        """Runs a decode batch and gives its tokens."""
        plan = None if self._cascade is None else self._cascade.plan(batch)
        shape = self._shape(batch, plan)
        step = self._graph(shape) if self._use_graphs else None
        self._upload(shape, batch, plan)
        began = self._mark()
        for _ in range(batch.steps):
            if step is None:
                self._decode_step(shape)
            else:
                step.replay()
        self.computed_tokens += shape.batch_size * batch.steps
        self.launches += 1
        values = {name: column[: batch.steps, : shape.batch_size] for name, column in self._values.items()}
        return self._to_host(batch.sequences, self._sampled[: batch.steps, : shape.batch_size], began, values)

    def _shape(self, batch: DecodeBatch, plan: CascadePlan | None) -> Shape:
        """Few different shapes. The width matters only to few sequences, whose pages are split over several blocks."""
        batch_size, pages = batch.block_tables.shape
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
        self.prefill(chunks).read()
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

    def _upload(
        self, shape: Shape, batch: DecodeBatch | None = None, plan: CascadePlan | None = None
    ) -> None:
        """One copy for all that a decode batch needs, laid out as `Inputs` reads it; the null slot without one."""
        flat = torch.full((input_size(shape),), NULL_PAGE, dtype=torch.int32)
        inputs = Inputs.of(flat, shape)
        inputs.slots.fill_(self._null_slot)
        if batch is not None:
            rows, pages = batch.block_tables.shape
            inputs.slots.numpy()[:rows] = batch.slots
            inputs.block_tables.numpy()[:rows, :pages] = batch.block_tables
        if plan is not None:
            inputs.starts.numpy()[: len(plan.starts)] = plan.starts
            inputs.members.numpy()[: len(plan.members)] = plan.members
            inputs.items.numpy()[: len(plan.items)] = plan.items
        self._inputs[: len(flat)].copy_(self._pin(flat), non_blocking=True)
        self._step.zero_()

    def _decode_step(self, shape: Shape) -> None:
        """One token for each sequence that still runs; runs under capture, so nothing is read back."""
        inputs = Inputs.of(self._inputs[: input_size(shape)], shape)
        slots, block_tables = inputs.slots.long(), inputs.block_tables
        shared = (
            SharedPrefixes(inputs.starts, inputs.members, inputs.items, shape.block_queries)
            if shape.items
            else None
        )
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

    def _start(self, sequences: list[Sequence], seq_lens: list[int], logits: Tensor) -> Tensor:
        """Puts sequences whose prompts are computed into their slots and chooses their first tokens."""
        slots = self._to_device([sequence.slot for sequence in sequences], np.int64)
        seq_len = self._to_device(seq_lens, np.int64)
        final_len = self._to_device([sequence.final_len for sequence in sequences], np.int64)
        prompt_len = self._to_device([len(sequence.request.token_ids) for sequence in sequences], np.int64)
        seed = self._to_device([signed(sequence.request.row_seed) for sequence in sequences], np.int64)
        seen = None
        if self._seen is not None:
            seq_ids = np.repeat(np.arange(len(sequences)), [len(sequence.prompt) for sequence in sequences])
            tokens = self._to_device(np.concatenate([sequence.prompt for sequence in sequences]), np.int64)
            self._seen[slots] = False
            self._seen[slots[self._to_device(seq_ids, np.int64)], tokens] = True
            seen = self._seen[slots]
        own = None
        if self._own is not None:
            numbers = row_sampling.numbers_of([one.request for one in sequences], self._sampler.sampling)
            own = self._to_device(np.array(numbers), np.float32)
            self._own[slots] = own
        if self._adapter is not None:
            adapters = [sequence.request.adapter for sequence in sequences]
            self._adapter[slots] = self._to_device(adapters, np.int32)
        states = None
        if self._sampler.mask is not None:
            answers = [sequence.prompt[len(sequence.request.token_ids) :] for sequence in sequences]
            begun = self._sampler.mask.begin([sequence.request for sequence in sequences], answers)
            states = self._to_device(begun, np.int32)
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
        return logits, self._copied(self._scoring.logprobs(states[0], wanted, places, scored.places))

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

    def _to_host(
        self, sequences: list[Sequence], tokens: Tensor, began: Mark, values: dict[str, Tensor]
    ) -> Pending:
        tokens = self._copied(tokens)
        values = {name: self._copied(column) for name, column in values.items()}
        return Pending(sequences, tokens, began, self._mark(), values)

    def _copied(self, tensor: Tensor) -> Tensor:
        """On its way to the host; there once the device has come so far."""
        if not devices.is_gpu(self._device):
            return tensor.clone()
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)

    def _mark(self) -> Mark:
        if not devices.is_gpu(self._device):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _to_device(self, values: list[int] | NDArray[Any], dtype: type) -> Tensor:
        return self._pin(torch.from_numpy(np.asarray(values, dtype))).to(self._device, non_blocking=True)

    def _pin(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if devices.is_gpu(self._device) else tensor
