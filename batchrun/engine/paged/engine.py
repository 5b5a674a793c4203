"""The paged engine: continuous batching over a paged key/value pool, without padding."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

import numpy as np
import torch

from batchrun.engine import stage
from batchrun.engine.loading import load_model
from batchrun.engine.out_of_memory import is_out_of_memory
from batchrun.engine.paged.architecture import Unsupported, check_positions, unsupported
from batchrun.engine.paged.attention import Cache
from batchrun.engine.paged.compiling import compile_layers, compile_sampler
from batchrun.engine.paged.memory import Budget, affordable_pages
from batchrun.engine.paged.pool import Pool
from batchrun.engine.paged.projections import join_projections
from batchrun.engine.paged.queue import Row
from batchrun.engine.paged.runner import Pending, Runner
from batchrun.engine.paged.sampler import BAD, Sampler
from batchrun.engine.paged.scheduler import OutputLengths, Round, Scheduler, Segment
from batchrun.engine.protocol import Completion, EngineSpec, EngineStats, Request
from batchrun.engine.stopping import StopStrings
from batchrun.errors import FaultCode, ModelError, RowFault

PAGE_SIZE = 256
"""Tokens; flash-attn 2 wants a multiple of it."""
Work = TypeVar("Work")
CANCEL_SECONDS = 0.2  # between two looks at whether rows are still wanted


class PagedEngine:
    """Any causal transformers model, unmodified, in rounds: admit and prefill, decode some steps, read back.

    Results are read one round behind, so that the device never waits for the host.
    """

    def __init__(self, spec: EngineSpec, model: Any, page_size: int = PAGE_SIZE) -> None:
        """Takes over `model`, on its device and ready for inference; see `load`.

        Raises:
            Unsupported: see `unsupported`.
        """
        device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
        budget = Budget.of(spec.options, device)
        check_positions(model.config, spec.max_context)
        cache = Cache(model.requires_grad_(False), page_size, dtype, device)
        if device.type == "cuda":
            join_projections(model)
        sampler = Sampler(spec.sampling)
        if budget.compile:
            compile_layers(model, cache.modules)
            if not sampler.greedy:
                compile_sampler(sampler)
        self._stops = frozenset(spec.stop_token_ids)
        self._strings = StopStrings(spec)
        self._longer_strings = StopStrings(spec)
        self._longer_strings.tail += budget.decode_steps
        self._looked = 0.0
        self._window, self._steps = budget.window_rows, budget.decode_steps
        self._runner = Runner(
            model, cache, sampler, sorted(self._stops), budget.max_rows, spec.max_context, self._steps, device
        )

        def warm_up() -> None:
            if budget.compile:
                stage.enter("compiling")
            self._runner.warm_up(budget.prefill_tokens)

        pages = affordable_pages(cache, budget, spec.max_context, device, warm_up)
        cache.allocate(pages)
        lengths = OutputLengths(certain=not self._stops and not self._strings)
        pool = Pool(pages, page_size)
        self._scheduler = Scheduler(pool, budget.max_rows, budget.prefill_tokens, spec.max_context, lengths)
        self._never_run = 0
        self.stats = EngineStats(
            engine="paged",
            attention=cache.provider.name,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            dtype=str(dtype).removeprefix("torch."),
            gauges={"pool_tokens": pool.pages * page_size},
        )

    @classmethod
    def load(cls, spec: EngineSpec) -> Self:
        """Loads the weights onto `spec.device`, finds out how much memory is left, and takes it for the pool.

        Raises:
            ModelError: the model cannot be loaded, or not by this engine: `unsupported` says why.
        """
        started = time.perf_counter()
        model = load_model(spec)
        try:
            engine = cls(spec, model)
        except Unsupported as reason:
            raise ModelError(
                f"the paged engine cannot run this model, since {reason}",
                spec.model_path,
                "set engine.kind: padded",
            ) from reason
        engine.stats.load_seconds = time.perf_counter() - started
        return engine

    unsupported = staticmethod(unsupported)

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        """See `Engine.generate`. Closing the generator lets every row go; the engine can be used again."""
        feed = _Feed(requests)
        scheduler, runner = self._scheduler, self._runner
        pending: deque[Pending] = deque()
        try:
            while True:
                yield from self._pull(feed)
                scheduler.last_rows = feed.ended
                yield from self._let_go(pending)
                while scheduler.worth_a_pack() and (pack := scheduler.next_pack()):
                    if (prefilled := self._try(runner.prefill, pack)) is None:
                        yield from self._retreat(pack, [segment.row for segment in pack], pending)
                        continue
                    pending.append(prefilled)
                    scheduler.launched_pack()
                if scheduler.short_of_pages(self._steps):
                    yield from self._read(pending, leaving=0)
                work = scheduler.next_round(self._steps)
                if work is not None:
                    if (decoded := self._try(runner.decode, work)) is None:
                        yield from self._retreat(work, work.rows, pending)
                        continue
                    pending.append(decoded)
                yield from self._read(pending, leaving=0 if work is None else 1)
                self._count()
                if feed.ended and not pending and not scheduler.active and not len(scheduler.queue):
                    return
        finally:
            for work_in_flight in pending:
                work_in_flight.read()
                self.stats.busy_seconds += work_in_flight.seconds
            scheduler.drop_all()
            self._count()

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
        """Reads results back, the oldest first, until so many are left; yields the rows that have ended."""
        while len(pending) > leaving:
            results = pending.popleft()
            columns = results.read()
            self.stats.busy_seconds += results.seconds
            going = [(row, tokens) for row, tokens in zip(results.rows, columns, strict=True) if not row.done]
            ended = {row: reason for row, tokens in going if (reason := self._take(row, tokens))}
            if self._strings:
                ended |= dict.fromkeys(self._cut_at_strings(going), "stop")
            for row, reason in ended.items():
                self._scheduler.finish(row)
                fault = (
                    RowFault(FaultCode.BAD_LOGITS, "the model gave no finite logits")
                    if reason == "error"
                    else None
                )
                yield self._complete(row.request, row.output, reason, fault)

    def _try(self, launch: Callable[[Work], Pending], work: Work) -> Pending | None:
        """What was launched, or None when it did not fit the device."""
        try:
            return launch(work)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _retreat(
        self, work: list[Segment] | Round, rows: list[Row], pending: deque[Pending]
    ) -> Iterator[Completion]:
        """After an out-of-memory: smaller packs and rounds from now on, and a row's fault only if it was alone."""
        yield from self._read(pending, leaving=0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self._scheduler.retreat(work):
            self.stats.notes.append(f"out of memory with {len(rows)} rows, smaller work since")
            return
        for row in rows:
            fault = RowFault(FaultCode.OUT_OF_MEMORY, "does not fit the device, even alone")
            self._scheduler.fail(row)
            yield self._complete(row.request, [], "error", fault)

    def _let_go(self, pending: deque[Pending]) -> Iterator[Completion]:
        """Rows that are not wanted any more leave with the tokens they have; looks for them now and then."""
        now = time.monotonic()
        if now - self._looked < CANCEL_SECONDS:
            return
        self._looked = now
        if self._scheduler.unwanted:
            yield from self._read(pending, leaving=0)
        for row in self._scheduler.let_go():
            self._count_output(row.request, row.output)
            yield row.request.so_far(np.array(row.output, np.int32))

    def _take(self, row: Row, tokens: list[int]) -> str | None:
        """Adds a row's new tokens to its output; its finish reason, once it has one."""
        if tokens[-1] >= 0:
            row.output += tokens
        else:
            row.output += [token for token in tokens if token >= 0]
            if BAD in tokens:
                return "error"
        if row.output[-1] in self._stops:
            return "stop"
        return "length" if len(row.output) >= row.request.max_new_tokens else None

    def _cut_at_strings(self, going: list[tuple[Row, list[int]]]) -> list[Row]:
        """Rows whose new tokens complete a stop string, their output cut after the token that does."""
        grown = [row for row, _ in going if row.output]
        if not grown:
            return []
        near = self._longer_strings.completed([row.output for row in grown])
        cut = []
        for row in (row for row, hit in zip(grown, near, strict=True) if hit):
            first = max(0, len(row.output) - self._steps)
            ends = range(first + 1, len(row.output) + 1)
            hits = self._strings.completed([row.output[:end] for end in ends])
            if any(hits):
                del row.output[ends[hits.index(True)] :]
                cut.append(row)
        return cut

    def _complete(
        self, request: Request, output: list[int], reason: str, fault: RowFault | None
    ) -> Completion:
        self.stats.completions += 1
        self._never_run += bool(output)
        self._count_output(request, output)
        return Completion(request.id, np.array(output, np.int32), reason, fault)

    def _count_output(self, request: Request, output: list[int]) -> None:
        self.stats.output_tokens += max(0, len(output) - len(request.generated))

    def _count(self) -> None:
        scheduler, runner, stats = self._scheduler, self._runner, self.stats
        # An answer's last token is sampled and never run; counted on both sides, work without padding is exactly 1.
        stats.computed_tokens = runner.computed_tokens + self._never_run
        stats.batches = runner.launches
        stats.steps = runner.launches
        stats.prompt_tokens = scheduler.prompt_tokens - scheduler.shared_tokens
        stats.gauges |= {
            "active_rows": scheduler.active,
            "active_prompt_tokens": scheduler.active_tokens[0],
            "active_output_tokens": scheduler.active_tokens[1],
            "waiting_rows": len(scheduler.queue),
            "pages": scheduler.pool.pages,
            "pages_free": scheduler.pool.available,
            "evictions": scheduler.evictions,
            "shared_prompt_tokens": scheduler.shared_tokens,
        }


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
