"""The missing rows of one attempt through an engine: prompts in, answers out, begun answers kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchrun.counters import Counters
from batchrun.dataset.reader import RowBatch
from batchrun.engine.processes.process import EngineProcess
from batchrun.engine.protocol import NO_TOKENS, Completion, Request
from batchrun.engine.tokens.token_values import first
from batchrun.errors import FaultCode, RowFault, StorageError
from batchrun.job.generation import RowSettings
from batchrun.output.attempt import Attempt, PartialAnswer
from batchrun.prompt.codec import PromptCodec, request_of
from batchrun.prompt.scoring import ChoiceScoring
from batchrun.prompt.tokens import Prompt
from batchrun.worker.answer_lengths import AnswerLengths
from batchrun.worker.answers import answered, failed
from batchrun.worker.duplicates import Duplicates
from batchrun.worker.handover import Handover
from batchrun.worker.scored_rows import ScoredRows

# Completions decoded together: large enough to amortize, small enough to be staged soon.
ANSWER_BATCH = 512
# Between two looks at what is due, however steadily completions come.
SETTLE_SECONDS = 0.5
# Prompts made together at most: fewer where they take long, so that the run sees each few of them as progress.
PROMPT_ROWS = 128
# An answer of at least so many tokens, all the same one and cut by length, comes of a broken model.
REPEATED = 64

NOTHING = PartialAnswer(0, NO_TOKENS)

Read = Callable[[Sequence[str]], Iterator[RowBatch]]


@dataclass(kw_only=True)
class AttemptCounters(Counters):
    """An attempt's own; the worker's heartbeat reads them while the task adds to them.

    `task` is the key of its task. `doing` is "reading", "generating" or "sealing"; `activity` grows with whatever the
    attempt does. `taken_over` rows are all that it is at, of a partition that another attempt has begun; 0 where it is
    at all missing ones. `work_done` and `work_left` are its rows', as `Handover` reckons. `opening` are the seconds
    until its first row went to the engine, `began` a moment of this machine's clock.
    """

    run: str
    partition: int
    task: str = ""
    doing: str = "reading"
    activity: int = 0
    taken_over: int = 0
    work_done: float = 0.0
    work_left: float = 0.0
    opening: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def may_hold_answers(self) -> bool:
        """Whether there may be answers that it has to stage before it ends; none while it opens a tokenizer, say."""
        return self.doing != "reading"


class Generation:
    """Fills an attempt with the answers to `rows` (bool, by row of the partition).

    A row whose logits were no numbers, or whose answer is one token repeated, is tried once more in a fresh engine
    at the end, unless `rows_to_blame` said before that a fresh engine changes nothing; it says so now, if none of the
    rows came right. `begun` holds what rows are so far that the engine let go of when they were not wanted any more, by
    the number of its request: the row's, or row * samples + sample. With `duplicates`, of rows with the same prompt one
    goes to the engine. `lengths` learns from the answers. With `is_first` the engine begins with these rows before it
    begins with more of other attempts'.
    """

    def __init__(
        self,
        read: Read,
        attempt: Attempt,
        codec: PromptCodec,
        max_new_tokens: int,
        counters: AttemptCounters,
        rows: NDArray[np.bool_],
        rows_to_blame: bool = False,
        samples: int = 1,
        duplicates: Duplicates | None = None,
        lengths: AnswerLengths | None = None,
        is_first: bool = False,
    ) -> None:
        self.rows_to_blame = rows_to_blame
        self.begun: dict[int, PartialAnswer] = {}
        self._read, self._attempt, self._codec, self._counters = read, attempt, codec, counters
        self._max_new_tokens, self._samples = max_new_tokens, samples
        # (rows, samples) which are to be generated: of a row that is tried again, perhaps only some.
        self._wanted = attempt.missing_samples
        self._rows_of_row = attempt.settings.rows_of_row
        self._duplicates = duplicates
        self._rows = rows
        self._prompts_at_once = 1
        self._lengths = np.zeros(len(rows), np.int32)
        self._reasoning = np.zeros(len(rows), bool)
        # Of rows that have their own.
        self._settings: dict[int, RowSettings] = {}
        self._done: list[Completion] = []
        self._faults: dict[int, RowFault] = {}
        self._scored = ScoredRows(len(rows))
        self._choices: dict[int, ChoiceScoring] = {}
        # Rows that the engine finished and the attempt has taken.
        self.answered = 0
        self.handover = Handover(rows, counters, duplicates, lengths or AnswerLengths())
        self._is_first = is_first
        self._doubtful: dict[int, list[Completion]] = {}
        # By row: samples that are out, while others of their row are not.
        self._waiting: dict[int, list[Completion]] = {}
        self._doubtful_pid = 0
        self._second = False
        self._healed = False
        self._settled = time.monotonic()

    def run(self, engine: EngineProcess, still_wanted: Callable[[], bool]) -> None:
        """Raises what reading, the engine and storage raise; what was finished before is in the attempt."""
        self._counters.doing = "generating"
        self.handover.wake = lambda: engine.wake()
        try:
            self._all(engine, still_wanted)
        finally:
            self.handover.close()
            if self._duplicates is not None:
                self._duplicates.release()

    def _all(self, engine: EngineProcess, still_wanted: Callable[[], bool]) -> None:
        self._once(engine, still_wanted)
        self.handover.close()
        self._keep_waiting()
        if not self._doubtful or not still_wanted():
            return
        # A fresh engine keeps the worker from its other rows while it loads. A broken one fails more than a few.
        if self.rows_to_blame and len(self._doubtful) <= self.answered:
            for samples in self._doubtful.values():
                self._finish(samples)
            self._settle()
            return
        self._second = True
        if self._duplicates is not None:
            # Whoever waits for these keeps the engine from being replaced.
            self._duplicates.release()
        self._rows = np.zeros_like(self._rows)
        self._rows[[*self._doubtful]] = True
        engine.renew(self._doubtful_pid)
        self._once(engine, still_wanted)
        self._waiting.clear()
        if still_wanted():
            self.rows_to_blame = not self._healed

    def _once(self, engine: EngineProcess, still_wanted: Callable[[], bool]) -> None:
        try:
            with contextlib.closing(
                engine.generate(self._requests(), still_wanted, self.handover, self._is_first)
            ) as completions:
                for completion in completions:
                    if completion is not None and self._codec.builder.is_scored:
                        completion = self._scored.whole(completion)
                    if completion is not None:
                        self._sort(completion, engine)
                        due = time.monotonic() - self._settled >= SETTLE_SECONDS
                        if len(self._done) < ANSWER_BATCH and not due:
                            continue
                    self._settle()
        except StorageError:
            # Minutes of patience went into that flush; another would only be waited for as long.
            raise
        except BaseException:
            # What was finished before the engine died is not generated again.
            self._settle()
            raise
        self._settle()

    def _requests(self) -> Iterator[Request | None]:
        """The wanted rows' requests; None after prompts that took long, for a look at what is due."""
        builder = self._codec.builder
        for batch in self._read(builder.columns):
            self._counters.activity += 1
            wanted = np.flatnonzero(self._rows[batch.first : batch.first + batch.records.num_rows])
            if not len(wanted):
                continue
            rows = (batch.first + wanted).tolist()
            if batch.fault is not None:
                self.handover.reach(rows[-1])
                self._faults.update(dict.fromkeys(rows, batch.fault))
                continue
            whole = len(wanted) == batch.records.num_rows
            records = batch.records if whole else batch.records.take(pa.array(wanted))
            seeds = batch.row_ids[wanted].view(np.int64).tolist()
            places = zip(rows, seeds, strict=True)
            for prompt in self._prompts(records):
                if prompt is None:
                    yield None
                    continue
                row, seed = next(places)
                if not self.handover.reach(row):
                    continue
                self._counters.pulled += 1
                if isinstance(prompt, RowFault):
                    self._faults[row] = prompt
                    continue
                length = len(prompt.token_ids)
                self._lengths[row], self._reasoning[row] = length, prompt.is_reasoning
                if prompt.behind is not None:
                    if prompt.behind.choices is not None:
                        self._choices[row] = prompt.behind.choices
                    requests = self._scored.requests(row, prompt, seed)
                    yield from self._sent(row, None, requests)
                    continue
                if prompt.settings is not None:
                    self._settings[row] = prompt.settings
                requests = self._requests_of(row, prompt, seed)
                if self._second or self._duplicates is None or self._duplicates.admit(requests[0]):
                    yield from self._sent(row, prompt.settings, requests)
        while self._duplicates is not None and self._duplicates.are_elsewhere:
            for request in self._duplicates.left_to_us():
                yield from self._sent(request.id, self._settings.get(request.id), [request])
            yield None

    def _requests_of(self, row: int, prompt: Prompt, seed: int) -> list[Request]:
        """One for each of the row's wanted samples, going on where an earlier attempt left it."""
        requests, spec = [], self._codec.engine
        for sample in np.flatnonzero(self._wanted[row]).tolist():
            number = row * self._samples + sample
            request = request_of(number, prompt, seed, self._max_new_tokens, spec, sample)
            begun = self._begun_before(number, len(prompt.token_ids), request.max_new_tokens)
            request.generated, request.values = begun.tokens, begun.values
            requests.append(request)
        return requests

    def _sent(self, row: int, settings: RowSettings | None, requests: list[Request]) -> list[Request]:
        """The requests of a row, which are counted."""
        limit = settings.max_new_tokens if settings is not None else 0
        self._counters.opening = self._counters.opening or time.monotonic() - self._counters.began
        self._counters.requests += 1
        self._counters.sent_tokens += len(requests[0].token_ids)
        self._counters.sent_limits += limit
        self._counters.more_samples += self._samples - 1
        self.handover.sent(row, requests, limit)
        return requests

    def _prompts(self, records: pa.RecordBatch) -> Iterator[Prompt | RowFault | None]:
        """The rows' prompts or faults, in order, made of as many rows at once as take about SETTLE_SECONDS; None
        after those that took longer."""
        first = 0
        while first < records.num_rows:
            piece = records.slice(first, self._prompts_at_once)
            started = time.monotonic()
            prompts = self._codec.builder.prompts(piece)
            seconds = time.monotonic() - started
            self._counters.activity += 1
            yield from prompts
            if seconds > SETTLE_SECONDS:
                yield None
            first += piece.num_rows
            fitting = int(piece.num_rows * SETTLE_SECONDS / max(seconds, 1e-9))
            self._prompts_at_once = max(1, min(PROMPT_ROWS, 2 * self._prompts_at_once, fitting))

    def _begun_before(self, number: int, prompt_tokens: int, max_new_tokens: int) -> PartialAnswer:
        """The tokens that an earlier attempt left; none where they cannot be this prompt's."""
        one = self._attempt.begun.get(number)
        if one is None or self._second or one.prompt_tokens != prompt_tokens:
            return NOTHING
        return one if len(one.tokens) < max_new_tokens else NOTHING

    def _sort(self, completion: Completion, engine: EngineProcess) -> None:
        """To the finished rows, the begun ones, or those that are tried again; a row goes with all its samples."""
        row = completion.id // self._samples
        if completion.finish_reason == "cancelled":
            if len(completion.token_ids) or not self.handover.came_back(row):
                self._keep(completion, len(completion.token_ids))
            return
        samples = [*self._waiting.pop(row, []), _judged(completion)]
        if len(samples) < np.count_nonzero(self._wanted[row]):
            self._waiting[row] = samples
            return
        self.handover.ended(row, sum(len(one.token_ids) for one in samples))
        samples.sort(key=lambda one: one.id)
        doubtful = any(one.fault is not None and one.fault.code in SECOND_TRY for one in samples)
        if self._second or not doubtful:
            self._healed |= self._second and not doubtful
            self._finish(samples)
            return
        self._doubtful[row] = samples
        self._doubtful_pid = engine.pid or 0

    def _finish(self, samples: list[Completion]) -> None:
        self._done += samples
        if self._duplicates is not None:
            self._duplicates.ended(samples[0])

    def _keep(self, completion: Completion, tokens: int) -> None:
        """For a later attempt, the first so many tokens of an answer."""
        if tokens > 0:
            self.begun[completion.id] = PartialAnswer(
                int(self._lengths[completion.id // self._samples]),
                completion.token_ids[:tokens],
                first(completion.values, tokens),
            )

    def _keep_waiting(self) -> None:
        """Samples whose rows lack others: without their last tokens, which a later attempt chooses again, so that it
        ends them as this one did."""
        for completion in chain(*self._waiting.values()):
            self._keep(completion, len(completion.token_ids) - 1)
        self._waiting.clear()

    def _settle(self) -> None:
        if self._done:
            rows = {one.id // self._samples for one in self._done}
            self._add(self._answers(self._done))
            if self._settings:
                self._counters.limits += sum(
                    self._settings[row].max_new_tokens for row in rows if row in self._settings
                )
            self.answered += len(rows)
        if self._duplicates is not None and (copies := self._duplicates.take()):
            self._add(self._answers(copies), are_copies=True)
        if self._faults:
            self._counters.activity += 1
            faults = failed(self._faults)
            self._counters.count(faults, self._attempt.name_of)
            self._attempt.add_failed(faults)
        self._done.clear()
        self._faults.clear()
        self._attempt.maybe_flush()
        self._settled = time.monotonic()

    def _answers(self, done: list[Completion]) -> pa.Table:
        own = [self._settings.get(one.id // self._samples) for one in done] if self._settings else []
        stops = [one.stop if one else None for one in own] or None
        choices = [self._choices.pop(one.id, None) for one in done] if self._choices else []
        return answered(
            done,
            self._lengths,
            self._codec,
            self._reasoning,
            stops,
            self._samples,
            self._rows_of_row,
            choices,
        )

    def _add(self, answers: pa.Table, are_copies: bool = False) -> None:
        self._counters.activity += 1
        self._counters.count(answers, self._attempt.name_of_answer, are_copies, self._rows_of_row)
        self._attempt.add(answers)


SECOND_TRY = {FaultCode.BAD_LOGITS, FaultCode.REPEATED_TOKEN}


def _judged(completion: Completion) -> Completion:
    """The completion, with a fault where its answer is one token all through."""
    tokens = completion.token_ids
    if completion.finish_reason != "length" or len(tokens) < REPEATED or tokens[0] != tokens[-1]:
        return completion
    if (tokens != tokens[0]).any():
        return completion
    fault = RowFault(FaultCode.REPEATED_TOKEN, f"{len(tokens)} times token {tokens[0]} and nothing else")
    return replace(completion, token_ids=NO_TOKENS, finish_reason="error", fault=fault, values={})
