"""Pages, prefills and decode batches without a model: a device of plain lists checks what every row would read."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchrun.engine.paged.schedule.batches import DecodeBatch, PrefillChunk
from batchrun.engine.paged.schedule.output_lengths import OutputLengths
from batchrun.engine.paged.schedule.page_pool import PagePool
from batchrun.engine.paged.schedule.queue import WaitingQueue
from batchrun.engine.paged.schedule.scheduler import Scheduler
from batchrun.engine.paged.schedule.sequence import Sequence
from batchrun.engine.protocol import Request


def _request(number: int, tokens: list[int], new: int) -> Request:
    return Request(number, np.array(tokens, np.int32), new)


class Device:
    """Pages that hold the tokens whose keys and values a real device would hold there."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.size = page_size
        self.memory = [[-1] * page_size for _ in range(pages)]

    def prefill(self, chunks: list[PrefillChunk]) -> None:
        copies = [(s, list(self.memory[s.copy_from])) for s in chunks if s.copied]
        for chunk, source in copies:
            self.memory[chunk.copy_to][: chunk.copied] = source[: chunk.copied]
        for chunk in chunks:
            for place in range(chunk.start, chunk.stop):
                self.write(chunk.sequence.pages, place, int(chunk.sequence.prompt[place]))
        for chunk in chunks:
            self.check(chunk.sequence.pages, chunk.sequence.prompt[: chunk.stop].tolist())

    def write(self, pages: list[int], place: int, token: int) -> None:
        self.memory[pages[place // self.size]][place % self.size] = token

    def check(self, pages: list[int], tokens: list[int]) -> None:
        read = [self.memory[pages[i // self.size]][i % self.size] for i in range(len(tokens))]
        assert read == tokens, "a row reads keys that are not its own"


class Run:
    """Drives a scheduler as the engine does, one round behind, with rows that stop when chance says so."""

    def __init__(self, scheduler: Scheduler, device: Device, rng: random.Random, stop_chance: float) -> None:
        self.scheduler, self.device, self.rng, self.stop_chance = scheduler, device, rng, stop_chance
        self.ended: dict[int, int] = {}
        self.behind: list[tuple[Sequence, list[int]]] = []
        self.said: dict[Sequence, list[int]] = {}
        self.stopped: set[Sequence] = set()

    def say(self, sequence: Sequence) -> int:
        """The device's next token of a row, which the host knows only after `read`."""
        token = self.rng.randrange(5)
        self.said.setdefault(sequence, []).append(token)
        if self.rng.random() < self.stop_chance:
            self.stopped.add(sequence)
        return token

    def prefill(self, chunks: list[PrefillChunk]) -> None:
        self.device.prefill(chunks)
        self.behind += [(s.sequence, [self.say(s.sequence)]) for s in chunks if s.complete]
        self.scheduler.prefill_launched()

    def decode(self, work: DecodeBatch) -> None:
        results = []
        self.check_common(work)
        for sequence, table in zip(work.sequences, work.block_tables.tolist(), strict=True):
            new: list[int] = []
            known = sequence.request.token_ids.tolist() + self.said[sequence]
            for _ in range(work.steps):
                if sequence in self.stopped or len(known) > sequence.final_len:
                    break
                self.device.write(table, len(known) - 1, known[-1])
                self.device.check(table, known)
                new.append(self.say(sequence))
                known.append(new[-1])
            results.append((sequence, new))
        self.read()
        self.behind = results

    def check_common(self, work: DecodeBatch) -> None:
        """What neighbours in the order of prompts have in common is in the pages of both, before the step's token."""
        assert sorted(work.prompt_order.tolist()) == list(range(len(work.sequences)))
        pairs = itertools.pairwise(work.prompt_order.tolist())
        for (one, other), common in zip(pairs, work.common[1:].tolist(), strict=True):
            tokens = work.sequences[one].prompt[:common].tolist()
            for row in (one, other):
                assert common <= len(work.sequences[row].prompt)
                self.device.check(work.block_tables[row].tolist(), tokens)

    def read(self) -> None:
        for sequence, tokens in self.behind:
            if sequence.finished:
                continue
            sequence.output += tokens
            full = len(sequence.output) == sequence.request.max_new_tokens
            if full or (sequence in self.stopped and sequence.output == self.said[sequence]):
                self.ended[sequence.request.id] = self.ended.get(sequence.request.id, 0) + 1
                self.scheduler.finish(sequence)
        self.behind = []

    def turn(self, steps: int) -> bool:
        while self.scheduler.should_prefill() and (chunks := self.scheduler.next_prefill()):
            self.prefill(chunks)
            self.scheduler.check()
        if self.scheduler.must_preempt(steps):
            self.read()
        work = self.scheduler.next_decode(steps)
        if work is None:
            self.read()
        else:
            self.decode(work)
        self.scheduler.check()
        return bool(len(self.scheduler.queue) or self.scheduler.active or self.behind)


@settings(max_examples=400)
@example(seed=69, page_size=16, pages=13, max_rows=2, prefill_tokens=16, steps=5, certain=True)
@example(seed=7, page_size=32, pages=9, max_rows=12, prefill_tokens=60, steps=3, certain=False)
@given(
    seed=st.integers(0, 10**9),
    page_size=st.sampled_from([4, 16, 32]),
    pages=st.integers(8, 40),
    max_rows=st.integers(1, 12),
    prefill_tokens=st.integers(4, 60),
    steps=st.integers(1, 16),
    certain=st.booleans(),
)
def test_under_any_schedule_rows_read_their_own_tokens_no_page_leaks_and_each_row_ends_once(
    seed: int, page_size: int, pages: int, max_rows: int, prefill_tokens: int, steps: int, certain: bool
) -> None:
    rng = random.Random(seed)
    pool = PagePool(pages, page_size)
    context = min(120, (pages - 1) * page_size)
    scheduler = Scheduler(pool, max_rows, prefill_tokens, context, OutputLengths(certain))
    run = Run(scheduler, Device(pages, page_size), rng, 0.0 if certain else rng.choice([0.0, 0.05, 0.3]))
    prefixes = [[rng.randrange(5) for _ in range(rng.randrange(context // 2))] for _ in range(3)]
    waiting = []
    for number in range(rng.randrange(1, 40)):
        prompt = (rng.choice(prefixes) + [rng.randrange(5) for _ in range(rng.randrange(1, 20))])[
            : context - 1
        ]
        waiting.append(_request(number, prompt, rng.randrange(1, min(30, context - len(prompt)) + 1)))
    going = True
    while waiting or going:
        scheduler.no_more_requests = not waiting
        for _ in range(rng.randrange(4)):
            if waiting:
                request = waiting.pop()
                assert scheduler.fits(request)
                scheduler.add(request)
        going = run.turn(steps)
    assert set(run.ended.values()) == {1}
    assert len(run.ended) == scheduler._admissions - scheduler.preemptions
    assert pool.available == pool.num_pages


def test_rows_are_served_longest_first_and_groups_as_a_whole() -> None:
    queue = WaitingQueue()
    shared = list(range(80))
    for number, length in enumerate([3, 9, 5]):
        queue.push(Sequence.of(_request(number, [7] * length, 1)))
    for number, length in enumerate([2, 1, 6], start=10):
        queue.push(Sequence.of(_request(number, shared + [9] * length, 1)))
    queue.push(Sequence.of(_request(20, [8] * 100, 1)))
    order = []
    while len(queue):
        first = queue.peek()
        assert queue.pop() is first
        order.append(first.request.id)
    assert order == [20, 12, 10, 11, 1, 2, 0]


def test_groups_within_a_group_are_served_as_a_whole_too() -> None:
    """All prompts begin with the same instructions; behind them, rows of three documents alternate."""
    queue, instructions = WaitingQueue(), [7] * 70
    for number in range(12):
        document = [100 + number % 3] * (40 + 20 * (number % 3))
        queue.push(Sequence.of(_request(number, [*instructions, *document, *[number] * (12 - number)], 1)))
    order = [queue.pop().request.id for _ in range(12)]
    assert order == [2, 5, 8, 11, 1, 4, 7, 10, 0, 3, 6, 9]


def test_who_may_generate_much_goes_before_a_beginning_in_common() -> None:
    queue, shared = WaitingQueue(), [3] * 40
    for number, new in enumerate([4, 600, 5, 500]):
        queue.push(Sequence.of(_request(number, [*shared, number], new)))
    queue.push(Sequence.of(_request(9, [8] * 90, 40)))
    assert [queue.pop().request.id for _ in range(5)] == [1, 3, 9, 2, 0]


@settings(max_examples=200)
@given(seed=st.integers(0, 10**9))
def test_waiting_rows_come_once_and_those_with_a_beginning_in_common_one_after_another(seed: int) -> None:
    rng = random.Random(seed)
    queue, prompts, order = WaitingQueue(), {}, []
    for number in range(60):
        if len(queue) and rng.random() < 0.2:
            first = queue.peek()
            assert queue.pop() is first
            order.append(first.request.id)
        old = rng.choice([[], *prompts.values()])
        prompts[number] = (old[: rng.randrange(len(old) + 1)] + [rng.randrange(2)] * rng.choice([1, 20, 40]))[
            -300:
        ]
        queue.push(Sequence.of(_request(number, prompts[number], 1)))
    if rng.random() < 0.3:
        for number in rng.sample(range(60), 10):
            for _, sequence in queue._trees[min(queue._trees)]:
                sequence.request.cancelled = sequence.request.cancelled or sequence.request.id == number
        order += [sequence.request.id for sequence in queue.take_cancelled()]
    rest = []
    while len(queue):
        rest.append(queue.pop().request.id)
    assert sorted(order + rest) == list(range(60))
    assert queue.new_tokens == 0
    for stop in range(16, 300, 16):
        groups = [tuple(prompts[number][:stop]) for number in rest if len(prompts[number]) >= stop]
        changes = sum(one != other for one, other in itertools.pairwise(groups))
        assert changes == len(set(groups)) - bool(groups), "rows of a group are apart"


@settings(max_examples=200)
@given(seed=st.integers(0, 10**9))
def test_the_queue_knows_how_much_its_rows_may_generate_and_the_longest_of_them(seed: int) -> None:
    rng = random.Random(seed)
    queue, waiting = WaitingQueue(), []
    for number in range(80):
        if waiting and rng.random() < 0.4:
            sequence = queue.pop()
            waiting.remove(sequence)
            if rng.random() < 0.2:
                sequence.prompt = np.concatenate([sequence.prompt, np.zeros(1, np.int32)])
                queue.push_front(sequence)
                waiting.append(sequence)
                assert queue.pop() is waiting.pop()
        else:
            beginning = [rng.randrange(3)] * rng.choice([1, 70])
            waiting.append(Sequence.of(_request(number, beginning, rng.randrange(2, 40))))
            queue.push(waiting[-1])
        assert queue.new_tokens == sum(sequence.request.max_new_tokens for sequence in waiting)
        assert queue.longest == max((sequence.request.max_new_tokens for sequence in waiting), default=0)


def test_the_last_rows_end_together_instead_of_leaving_a_few_to_steps_of_their_own() -> None:
    rng = random.Random(0)
    lengths = [min(600, max(8, int(rng.lognormvariate(4.6, 0.7)))) for _ in range(1500)]

    def rows_per_step(no_more_requests: bool) -> list[int]:
        scheduler = Scheduler(PagePool(6000, 16), 2048, 4096, 640, OutputLengths(certain=True))
        scheduler.no_more_requests = no_more_requests
        for number, new in enumerate(lengths):
            scheduler.add(_request(number, [number % 50] * 20, new))
        rows: list[int] = []
        while scheduler.active or len(scheduler.queue):
            while scheduler.should_prefill() and scheduler.next_prefill():
                scheduler.prefill_launched()
            if work := scheduler.next_decode(8):
                rows += [len(work.sequences)] * work.steps
        return rows

    hasty, even = rows_per_step(False), rows_per_step(True)
    assert len(even) <= 1.01 * len(hasty)
    assert sum(rows < 128 for rows in hasty) > 0.25 * len(hasty)
    assert sum(rows < 128 for rows in even) < 0.1 * len(even)


def test_a_preempted_row_comes_first_with_its_output() -> None:
    scheduler = Scheduler(PagePool(29, 4), 4, 100, 68, OutputLengths(certain=False))
    run = Run(scheduler, Device(29, 4), random.Random(0), 0.0)
    for number in range(3):
        scheduler.add(_request(number, [number] * 5, 60))
    while not scheduler.preemptions:
        assert run.turn(steps=2)
    preempted = scheduler.queue.peek()
    assert preempted.output == run.said[preempted]
    assert preempted.prompt.tolist() == preempted.request.token_ids.tolist() + preempted.output
    while run.turn(steps=2):
        pass
    assert run.ended == {0: 1, 1: 1, 2: 1}


def test_waiting_rows_cost_nothing_per_step() -> None:
    def seconds_per_round(waiting: int) -> float:
        scheduler = Scheduler(PagePool(2000, 16), 64, 512, 512, OutputLengths(certain=True))
        for number in range(waiting):
            scheduler.add(_request(number, [number % 50] * 9, 400))
        while scheduler.should_prefill() and scheduler.next_prefill():
            scheduler.prefill_launched()
        best = 1.0
        for _ in range(30):
            started = time.perf_counter()
            scheduler.should_prefill()
            scheduler.next_decode(4)
            best = min(best, time.perf_counter() - started)
        return best

    assert seconds_per_round(100_000) < 3 * seconds_per_round(200) + 1e-4


def test_expected_lengths_are_learned_and_never_above_the_limit() -> None:
    lengths = OutputLengths(certain=False)
    for _ in range(100):
        lengths.learn(40)
    limits = np.array([1000, 1000, 50], np.int32)
    expected = lengths.expect(limits, np.array([0, 500, 0], np.int32))
    assert expected.tolist() == [76, 641, 50]
    assert OutputLengths(certain=True).expect(limits, limits * 0).tolist() == limits.tolist()


def test_pages_in_the_index_are_given_out_last_and_the_start_of_a_prompt_last_of_all() -> None:
    pool = PagePool(9, 4)
    prompt = np.arange(17, dtype=np.int32)
    pages = pool.allocate(4)
    pool.insert(prompt, pages, 0, 16)
    pool.launched()
    pool.free(pages)
    assert pool.match_prefix(prompt).pages == tuple(pages)
    assert not set(pool.allocate(4)) & set(pages)
    assert pool.allocate(1) == [pages[3]]
    assert pool.match_prefix(prompt).pages == tuple(pages[:3])


def test_of_many_pages_behind_a_prefix_the_one_with_most_in_common_is_copied() -> None:
    pool, rng = PagePool(60, 64), np.random.default_rng(0)
    prompts = [rng.integers(0, 50, 40).astype(np.int32) for _ in range(50)]
    pages = [pool.allocate(1) for _ in prompts]
    for prompt, own in zip(prompts, pages, strict=True):
        pool.insert(prompt, own, 0, len(prompt))
    assert pool.match_prefix(prompts[7]).wait, "what is not computed yet cannot be copied"
    pool.launched()
    for prompt, own in zip(prompts, pages, strict=True):
        for common in (16, 25, 40):
            match = pool.match_prefix(np.append(prompt[:common], [99] * 30).astype(np.int32))
            assert (match.copy_from, match.copied) == (own[0], common)
    pool.free(pages[7])
    pool.allocate(pool.available)
    assert not pool.match_prefix(prompts[7]).copied


def test_a_whole_page_is_copied_from_too_where_prompts_part_within_it() -> None:
    pool, prompt = PagePool(9, 32), np.arange(70, dtype=np.int32)
    pages = pool.allocate(3)
    pool.insert(prompt, pages, 0, 70)
    pool.launched()
    other = np.append(prompt[:50], prompt)
    match = pool.match_prefix(other)
    assert (match.pages, match.copy_from, match.copied) == ((pages[0],), pages[1], 18)


def test_of_the_prompt_tokens_that_a_window_has_in_common_nearly_all_are_computed_once() -> None:
    rng = random.Random(1)
    beginnings = [[rng.randrange(1000) for _ in range(rng.randrange(20, 200))] for _ in range(150)]
    prompts = [
        rng.choice(beginnings) + [rng.randrange(1000) for _ in range(rng.randrange(5, 150))]
        for _ in range(1500)
    ]
    scheduler = Scheduler(PagePool(300, 256), 200, 4096, 512, OutputLengths(certain=True))
    for number, prompt in enumerate(prompts):
        scheduler.add(_request(number, prompt, 16))
    while len(scheduler.queue) or scheduler.active:
        while scheduler.should_prefill() and scheduler.next_prefill():
            scheduler.prefill_launched()
        scheduler.next_decode(8)
    ordered = sorted(prompts)
    common = sum(
        next(
            (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
        )
        for one, other in itertools.pairwise(ordered)
    )
    assert scheduler.shared_tokens > 0.95 * common
    scheduler.check()


def test_behind_a_document_the_few_words_that_questions_begin_with_are_computed_once_too() -> None:
    """They are fewer than would be worth a copy by themselves, of which these questions have one anyway."""
    rng = random.Random(2)
    documents = [[rng.randrange(1000) for _ in range(700)] for _ in range(4)]
    words = [[rng.randrange(1000) for _ in range(5)] for _ in range(40)]
    prompts = [
        rng.choice(documents) + rng.choice(words) + [1000 + number] + [7] * 12 for number in range(1200)
    ]
    scheduler = Scheduler(PagePool(2000, 256), 1000, 4096, 1024, OutputLengths(certain=True))
    for number, prompt in enumerate(prompts):
        scheduler.add(_request(number, prompt, 8))
    computed = 0
    while len(scheduler.queue) or scheduler.active:
        while scheduler.should_prefill() and (chunks := scheduler.next_prefill()):
            computed += sum(chunk.stop - chunk.start for chunk in chunks)
            scheduler.prefill_launched()
        scheduler.next_decode(8)
    distinct = {
        tuple(prompt[:stop]) for prompt in prompts for stop in range(len(prompt) - 18, len(prompt) + 1)
    }
    assert computed < 1.05 * (4 * 700 + len(distinct) - 4)


def test_rows_of_the_oldest_stream_go_first_and_in_a_stream_the_longest() -> None:
    queue, shared = WaitingQueue(), [1] * 64
    rows = [(2, [9] * 90), (1, [8] * 10), (2, shared + [9] * 40), (1, shared + [9] * 5), (1, [7] * 30)]
    for number, (stream, prompt) in enumerate(rows):
        queue.push(Sequence.of(replace(_request(number, prompt, 1), stream=stream)))
    assert [queue.pop().request.id for _ in rows] == [3, 4, 1, 2, 0]


def test_a_prefill_is_filled_past_rows_that_wait_to_copy_what_it_computes() -> None:
    """Rows with a beginning in common are together in the queue; the first one would end each prefill otherwise."""
    scheduler = Scheduler(PagePool(200, 32), 64, 1000, 512, OutputLengths(certain=True))
    alike = [5] * 20
    for number in range(3):
        scheduler.add(_request(number, [*alike, 7 + number, 8], 4))
    for number in range(3, 8):
        scheduler.add(_request(number, [100 + number] * 20, 4))
    chunks = scheduler.next_prefill()
    assert [chunk.sequence.request.id for chunk in chunks] == [0, 3, 4, 5, 6, 7]
    scheduler.prefill_launched()
    chunks = scheduler.next_prefill()
    assert [chunk.sequence.request.id for chunk in chunks] == [1, 2]
    assert all(chunk.copied == len(alike) for chunk in chunks)
    scheduler.prefill_launched()
    assert not len(scheduler.queue)
