"""The paged engine: continuous batching over a paged key/value pool, without padding."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Self, TypeVar

import numpy as np
import torch

from batchrun.engine.layers.fp8 import format_of
from batchrun.engine.out_of_memory import is_out_of_memory
from batchrun.engine.paged.attention import devices
from batchrun.engine.paged.attention.architecture import Unsupported, unsupported
from batchrun.engine.paged.device.device_side import allocate_pages, budget_of, make_runner
from batchrun.engine.paged.device.pending import Pending
from batchrun.engine.paged.device.runner import SETTLED
from batchrun.engine.paged.device.sampler import INVALID_TOKEN
from batchrun.engine.paged.parallel.divided_sampler import sampler_of
from batchrun.engine.paged.parallel.ranks import Ranks
from batchrun.engine.paged.parallel.share import load_share
from batchrun.engine.paged.schedule.batches import DecodeBatch, PrefillChunk
from batchrun.engine.paged.schedule.output_lengths import OutputLengths
from batchrun.engine.paged.schedule.page_pool import PagePool
from batchrun.engine.paged.schedule.scheduler import Scheduler
from batchrun.engine.paged.schedule.sequence import Sequence
from batchrun.engine.protocol import Completion, EngineSpec, EngineStats, Request, TokenValues
from batchrun.engine.tokens.answer_mask import AnswerMask
from batchrun.engine.tokens.scoring import score_completion
from batchrun.engine.tokens.stopping import StopStrings
from batchrun.engine.tokens.token_values import first, join
from batchrun.engine.weights.loading import load_model, random_model
from batchrun.errors import FaultCode, ModelError, RowFault

PAGE_SIZE = 256
"""Tokens."""
PREFILLS_AHEAD = 2
"""Launched before the results of an earlier one are read, so that the device has work meanwhile."""
Work = TypeVar("Work")
# Between two looks at which sequences are cancelled.
CANCEL_SECONDS = 0.2


class PagedEngine:
    """Any causal transformers model, unmodified, in rounds: admit and prefill, decode some steps, read back.

    Results are read one round behind, so that the device never waits for the host.
    """

    def __init__(
        self, spec: EngineSpec, model: Any, page_size: int = PAGE_SIZE, ranks: Ranks | None = None
    ) -> None:
        """Takes over `model`, on its device and ready for inference; see `load`. With `ranks` it is rank 0's share.

        Raises:
            Unsupported: see `unsupported`. ModelError: keys and values cannot be in fp8 on the device.
        """
        device = next(model.parameters()).device
        group = ranks.group if ranks else None
        budget = budget_of(spec, model, group)
        sampler, launch = sampler_of(spec, model), ranks.launch if ranks else None
        self._runner = make_runner(spec, model, sampler, budget, page_size, group, launch)
        self._answer_mask = self._runner.mask
        self._stop_ids = frozenset(spec.stop_token_ids)
        self._stop_strings = StopStrings(spec)
        self._round_stop_strings = StopStrings(spec, 1 + budget.decode_steps)
        self._cancel_checked = 0.0
        self._window, self._steps = budget.window_rows, budget.decode_steps
        self._ranks = ranks
        pages = allocate_pages(spec, self._runner, budget, group)
        if ranks:
            ranks.cache_tokens = (pages - 1) * page_size
        output_lengths = OutputLengths(certain=not self._stop_ids and not self._stop_strings)
        pool = PagePool(pages, page_size)
        self._scheduler = Scheduler(
            pool, budget.max_rows, budget.prefill_tokens, spec.max_context, output_lengths
        )
        self._never_run = 0
        self.stats = EngineStats(
            engine="paged",
            attention=self._runner.cache.name,
            device=torch.cuda.get_device_name(device) if devices.is_gpu(device) else str(device),
            dtype=format_of(model),
            gauges={"pool_tokens": pool.num_pages * page_size},
        )

    @classmethod
    def load(cls, spec: EngineSpec, config: Any = None) -> Self:
        """Loads the weights onto `spec.device`, finds out how much memory is left, and takes it for the pool. With the
        `config` of a model they are random ones, and no folder is read.

        Raises:
            ModelError: the model cannot be loaded, or not by this engine: `unsupported` says why.
        """
        started = time.perf_counter()
        try:
            # Before the model, so that all ranks load at the same time.
            ranks = Ranks(spec, PAGE_SIZE, config) if spec.gpus > 1 else None
            with ranks.waiting("loading") if ranks else nullcontext():
                if ranks:
                    model = load_share(spec, ranks.group, config)
                else:
                    model = load_model(spec) if config is None else random_model(spec, config)
                engine = cls(spec, model, ranks=ranks)
        except Unsupported as reason:
            raise ModelError(
                f"the paged engine cannot run this model, since {reason}",
                spec.model_path,
                "set engine.kind: padded" if spec.gpus == 1 else "set engine.gpus: 1, or use another model",
            ) from reason
        engine.stats.load_seconds = time.perf_counter() - started
        return engine

    unsupported = staticmethod(unsupported)

    def close(self) -> None:
        """Ends the other ranks, if there are any: with the process they end by themselves."""
        if self._ranks:
            self._ranks.close()

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        """See `Engine.generate`. Closing the generator aborts every sequence; the engine can be used again."""
        feed = _Feed(requests)
        scheduler, runner = self._scheduler, self._runner
        pending: deque[Pending] = deque()
        try:
            while True:
                yield from self._pull(feed)
                scheduler.no_more_requests = feed.ended
                yield from self._abort_cancelled(pending)
                while scheduler.should_prefill() and (chunks := scheduler.next_prefill()):
                    if (prefilled := self._launch(runner.prefill, chunks)) is None:
                        yield from self._shrink_after_oom(
                            chunks, [chunk.sequence for chunk in chunks], pending
                        )
                        continue
                    pending.append(prefilled)
                    scheduler.prefill_launched()
                    # Launching all prompts that there is room for takes a second, and rows without decode steps go on
                    # for as long as there are any: what is finished cannot wait for that.
                    yield from self._read(pending, leaving=PREFILLS_AHEAD)
                    # Where rows end with their prompts, there is nothing but prefills from the first row to the last.
                    self._count()
                    yield from self._abort_cancelled(pending)
                    yield from self._pull(feed)
                if scheduler.must_preempt(self._steps) or self._may_have_settled(pending):
                    yield from self._read(pending, leaving=0)
                work = scheduler.next_decode(self._steps)
                if work is not None:
                    if (decoded := self._launch(runner.decode, work)) is None:
                        yield from self._shrink_after_oom(work, work.sequences, pending)
                        continue
                    pending.append(decoded)
                yield from self._read(pending, leaving=0 if work is None else 1)
                self._count()
                if feed.ended and not pending and not scheduler.active and not len(scheduler.queue):
                    return
        finally:
            for work_in_flight in pending:
                self._wait_for(work_in_flight)
            scheduler.abort_all()
            self._count()

    def _may_have_settled(self, pending: deque[Pending]) -> bool:
        """Whether sequences of the last prefill have likely ended with their first token, as classes do: decode steps
        for them would take longer than to wait."""
        mask = self._answer_mask
        return mask is not None and mask.settles_at_once and bool(pending) and len(pending[-1].tokens) == 1

    def _pull(self, feed: _Feed) -> Iterator[Completion]:
        """Fills the window that is looked ahead at."""
        while len(self._scheduler.queue) < self._window and (request := feed.next()) is not None:
            self.stats.requests += 1
            if self._scheduler.fits(request):
                self._scheduler.add(request)
            else:
                tokens = len(request.token_ids) + request.max_new_tokens
                message = f"prompt and new tokens ({tokens}) exceed the engine's key/value memory"
                yield self._complete(request, [], "error", RowFault(FaultCode.OUT_OF_MEMORY, message))

    def _read(self, pending: deque[Pending], leaving: int) -> Iterator[Completion]:
        """Reads results back, the oldest first, until so many are left; yields the sequences that have ended."""
        while len(pending) > leaving:
            results = pending.popleft()
            columns = self._wait_for(results)
            running: list[tuple[Sequence, list[int]]] = []
            has_stop_strings = bool(self._stop_strings)
            ended: dict[Sequence, str] = {}
            for number, (sequence, tokens) in enumerate(zip(results.sequences, columns, strict=True)):
                if sequence.finished:
                    continue
                output, before, last = sequence.output, len(sequence.output), tokens[-1]
                if last >= 0 and last not in self._stop_ids:
                    # Nearly all sequences go on: no call for each of them.
                    output += tokens
                    if len(output) >= sequence.request.max_new_tokens:
                        ended[sequence] = "length"
                elif reason := self._append(sequence, tokens):
                    ended[sequence] = reason
                if has_stop_strings:
                    running.append((sequence, tokens))
                if results.values:
                    sequence.values.append(results.values_of(number, len(sequence.output) - before))
            if has_stop_strings:
                ended |= dict.fromkeys(self._cut_at_stop_strings(running), "stop")
            for sequence, reason in ended.items():
                self._scheduler.finish(sequence)
                fault = (
                    RowFault(FaultCode.BAD_LOGITS, "the model gave no finite logits")
                    if reason == "error"
                    else None
                )
                yield self._complete(sequence.request, sequence.output, reason, fault, _values(sequence))
            for sequence in results.take_scores():
                if not sequence.finished:
                    self._scheduler.finish(sequence)
                    self.stats.completions += 1
                    yield score_completion(sequence.request, sequence.scores)

    def _wait_for(self, results: Pending) -> list[list[int]]:
        """See `Pending.read`."""
        with self._ranks.waiting("a batch") if self._ranks else nullcontext():
            columns = results.read()
        self.stats.busy_seconds += results.seconds
        return columns

    def _launch(self, launch: Callable[[Work], Pending], work: Work) -> Pending | None:
        """What was launched, or None when it did not fit the device."""
        try:
            return launch(work)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _shrink_after_oom(
        self, work: list[PrefillChunk] | DecodeBatch, sequences: list[Sequence], pending: deque[Pending]
    ) -> Iterator[Completion]:
        """After an out-of-memory: smaller batches from now on, and a row's fault only if it was alone."""
        yield from self._read(pending, leaving=0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self._scheduler.shrink_after_oom(work):
            self.stats.notes.append(f"out of memory with {len(sequences)} rows, smaller work since")
            return
        for sequence in sequences:
            fault = RowFault(FaultCode.OUT_OF_MEMORY, "does not fit the device, even alone")
            self._scheduler.fail(sequence)
            yield self._complete(sequence.request, [], "error", fault)

    def _abort_cancelled(self, pending: deque[Pending]) -> Iterator[Completion]:
        """Cancelled sequences leave with the tokens they have; looks for them now and then."""
        now = time.monotonic()
        if now - self._cancel_checked < CANCEL_SECONDS:
            return
        self._cancel_checked = now
        if self._scheduler.has_cancelled:
            yield from self._read(pending, leaving=0)
        for sequence in self._scheduler.abort_cancelled():
            self._count_output(sequence.request, sequence.output)
            output = np.array(sequence.output, np.int32)
            yield sequence.request.so_far(output, _values(sequence))

    def _append(self, sequence: Sequence, tokens: list[int]) -> str | None:
        """Adds a sequence's new tokens to its output; its finish reason, once it has one."""
        if tokens[-1] >= 0:
            sequence.output += tokens
        else:
            sequence.output += [token for token in tokens if token >= 0]
            if INVALID_TOKEN in tokens:
                return "error"
            if self._answer_mask is not None and min(tokens) <= SETTLED:
                self._complete_answer(sequence, SETTLED - min(tokens), self._answer_mask)
        if sequence.output[-1] in self._stop_ids:
            return "stop"
        return "length" if len(sequence.output) >= sequence.request.max_new_tokens else None

    def _complete_answer(self, sequence: Sequence, last: int, mask: AnswerMask) -> None:
        """Adds the token behind which no choice is left, and the ending, as far as it may have tokens."""
        sequence.output.append(last)
        rest = mask.rest(sequence.request, sequence.output)
        rest = rest[: sequence.request.max_new_tokens - len(sequence.output)]
        sequence.output += rest
        self._never_run += len(rest)

    def _cut_at_stop_strings(self, running: list[tuple[Sequence, list[int]]]) -> list[Sequence]:
        """Sequences whose new tokens complete a stop string, their output cut after the token that does."""
        grown = [sequence for sequence, _ in running if sequence.output]
        if not grown:
            return []
        strings = [self._stop_strings.of(sequence.request) for sequence in grown]
        near = self._round_stop_strings.completed([sequence.output for sequence in grown], strings)
        cut = []
        for sequence, own in ((grown[i], strings[i]) for i, hit in enumerate(near) if hit):
            first = max(0, len(sequence.output) - self._steps)
            ends = range(first + 1, len(sequence.output) + 1)
            hits = self._stop_strings.completed([sequence.output[:end] for end in ends], [own] * len(ends))
            if any(hits):
                del sequence.output[ends[hits.index(True)] :]
                cut.append(sequence)
        return cut

    def _complete(
        self,
        request: Request,
        output: list[int],
        reason: str,
        fault: RowFault | None,
        values: TokenValues | None = None,
    ) -> Completion:
        self.stats.completions += 1
        self._never_run += bool(output)
        self._count_output(request, output)
        return Completion(request.id, np.array(output, np.int32), reason, fault, values or {})

    def _count_output(self, request: Request, output: list[int]) -> None:
        self.stats.output_tokens += max(0, len(output) - len(request.generated))

    def _count(self) -> None:
        scheduler, runner, stats = self._scheduler, self._runner, self.stats
        # An answer's last token is sampled and never run; counted on both sides, work without padding is exactly 1.
        stats.computed_tokens = runner.computed_tokens + self._never_run
        stats.batches = runner.launches
        stats.steps = runner.launches
        stats.prompt_tokens = scheduler.prompt_tokens - scheduler.shared_tokens
        stats.shared_tokens = scheduler.shared_tokens
        stats.notes += [note for note in runner.cache.backend.notes if note not in stats.notes]
        prompt_tokens, output_tokens = scheduler.active_tokens
        stats.gauges |= {
            "active_rows": scheduler.active,
            "active_prompt_tokens": prompt_tokens,
            "active_output_tokens": output_tokens,
            "waiting_rows": len(scheduler.queue),
            "pages": scheduler.pool.num_pages,
            "pages_free": scheduler.pool.available,
            "preemptions": scheduler.preemptions,
        }


def _values(sequence: Sequence) -> TokenValues:
    """Those of its output, which may have been cut."""
    return first(join(sequence.values), len(sequence.output))


class _Feed:
    """The iterator of requests, asked until it has nothing more; what it says in between is not kept."""

    def __init__(self, requests: Iterator[Request | None]) -> None:
        self._requests = requests
        self.ended = False

    def next(self) -> Request | None:
        """A request, or None when nothing is waiting right now."""
        if self.ended:
            return None
        try:
            return next(self._requests)
        except StopIteration:
            self.ended = True
            return None
