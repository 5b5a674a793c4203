"""The engine in its own process: shared by callers, replaced after it died, gone when its parent is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_engines import ENVIRONMENT, FAULT, KILL, RAISE, SLEEP
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import model_folder

from batchrun.engine.processes.launch import available_cores
from batchrun.engine.processes.process import EngineProcess
from batchrun.engine.processes.wire import PLACE_MASK, CompletionPack, RequestPack
from batchrun.engine.protocol import Completion, EngineSpec, Request
from batchrun.errors import EngineDied, EngineError, FaultCode, JobError, ModelError, RowFault


def spec(engine: str = "ObeyingEngine", **options) -> EngineSpec:
    return EngineSpec(f"fake_engines:{engine}", "the-model", "the-tokenizer", options=options)


@pytest.fixture
def process() -> Iterator[EngineProcess]:
    engine = EngineProcess(spec())
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def shared() -> Iterator[EngineProcess]:
    engine = EngineProcess(spec(window_rows=50))
    yield engine
    engine.stop()


def request(id: int, *tokens: int, limit: int = 8) -> Request:
    return Request(id, np.array(tokens, np.int32), limit)


def rows(count: int, length: int = 10) -> list[Request]:
    return [request(i, *range(i, i + length)) for i in range(count)]


def run(
    engine: EngineProcess, requests: Iterable[Request | None], is_first: bool = False
) -> dict[int, Completion]:
    completions = [c for c in engine.generate(iter(requests), is_first=is_first) if c is not None]
    assert len({c.id for c in completions}) == len(completions)
    return {c.id: c for c in completions}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def test_every_request_is_answered_once_with_its_own_answer(process):
    requests = rows(5000)
    answers = run(process, requests)
    assert len(answers) == 5000
    for r in requests:
        assert answers[r.id].token_ids.tolist() == r.token_ids[:8].tolist()
        assert answers[r.id].finish_reason == "length"


def test_a_call_that_goes_first_has_the_lowest_stream_of_all(process):
    for _ in process.generate(iter(rows(1))):
        pass
    opened = [process._child.open_stream(is_first) for is_first in (False, True, False, True)]
    (last,) = RequestPack.pack(opened[-1].number, 0, rows(1)).unpack()
    assert last.stream < min(stream.number for stream in opened[:-1])
    assert last.id & PLACE_MASK == 0
    for stream in opened:
        stream.close()


@settings(max_examples=25)
@given(
    streams=st.lists(
        st.lists(
            st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(1, 40), st.booleans()), max_size=300
        ),
        min_size=1,
        max_size=4,
    )
)
def test_streams_with_the_same_ids_never_get_each_others_answers(shared, streams):
    def feed(number: int, stream: list[tuple[int, int, bool]]) -> Iterator[Request | None]:
        for id, length, pause in stream:
            if pause:
                yield None
            yield request(id, number, *range(length))

    unique = [list({row[0]: row for row in stream}.values()) for stream in streams]
    with ThreadPoolExecutor(len(streams)) as pool:
        answers = list(
            pool.map(lambda numbered: run(shared, feed(*numbered), numbered[0] % 2 == 1), enumerate(unique))
        )
    for number, (stream, found) in enumerate(zip(unique, answers, strict=True)):
        assert {id: c.token_ids.tolist() for id, c in found.items()} == {
            id: [number, *range(length)][:8] for id, length, _ in stream
        }


def test_a_rows_fault_arrives_whole(process):
    answers = run(process, [request(1, 5), request(2, FAULT), request(3, 6)])
    assert answers[2].fault == RowFault(FaultCode.BAD_LOGITS, "told to")
    assert (answers[2].finish_reason, len(answers[2].token_ids)) == ("error", 0)
    assert answers[1].fault is answers[3].fault is None


@pytest.mark.parametrize("blow", ["from outside", "from inside"])
def test_a_killed_engine_ends_every_stream_and_the_next_use_starts_a_new_one(process, blow):
    met, struck = threading.Barrier(3, timeout=20), threading.Event()

    def long_stream() -> str:
        def feed() -> Iterator[Request | None]:
            yield request(0, 5)
            while not struck.is_set():
                yield None
            yield request(1, SLEEP, 30_000)

        answers = process.generate(feed())
        assert next(c for c in answers if c is not None).id == 0
        met.wait()
        with pytest.raises(EngineDied) as error:
            list(answers)
        return str(error.value)

    with ThreadPoolExecutor(3) as pool:
        streams = [pool.submit(long_stream) for _ in range(2)]
        met.wait()
        first_pid = process.pid
        if blow == "from inside":
            with pytest.raises(EngineDied, match=r"signal 9 .*the last thing it said"):
                run(process, [request(0, KILL)])
            struck.set()
        else:
            struck.set()
            time.sleep(0.2)
            os.kill(first_pid, signal.SIGKILL)
        for future in streams:
            assert "signal 9 (SIGKILL)" in future.result(60)
    assert gone_within(first_pid, 10)
    assert len(run(process, rows(10))) == 10
    assert process.pid != first_pid


def test_answers_that_were_out_before_the_end_are_not_lost(process):
    answers = process.generate(iter([*rows(100), request(100, SLEEP, 300), request(101, KILL)]))
    found = []

    def collect() -> None:
        found.extend(c.id for c in answers if c is not None)

    with pytest.raises(EngineDied):
        collect()
    assert sorted(found)[:100] == list(range(100))


def test_an_exception_in_the_engine_is_its_last_line_and_the_process_is_replaced(process):
    with pytest.raises(EngineError, match="engine failed: ValueError: told to raise") as error:
        run(process, [request(1, 5), request(2, RAISE)])
    assert not isinstance(error.value, EngineDied)
    assert len(run(process, rows(3))) == 3


@pytest.mark.parametrize(
    ("engine", "error", "message"),
    [
        ("UnloadableEngine", ModelError, "the-model: no such weights; copy them"),
        ("BrokenEngine", EngineError, "engine could not be loaded: ZeroDivisionError: while loading"),
        ("NoEngine", JobError, "has no load and no generate"),
        ("Absent", JobError, "cannot be imported"),
    ],
)
def test_a_load_failure_is_the_same_error_here_as_there(engine, error, message):
    process = EngineProcess(spec(engine))
    with pytest.raises(error, match=message):
        run(process, rows(3))
    assert gone_within(process.pid, 10)


def test_a_waiting_caller_gets_the_word_twice_a_second(process):
    started = time.monotonic()
    words = list(process.generate(iter([request(1, SLEEP, 3000)])))
    # Five, or fewer where this process had no turn in time.
    assert len(words[:-1]) >= 0.6 * 2 * (time.monotonic() - started)
    assert words[:-1] == [None] * len(words[:-1])


def test_closing_a_stream_drops_what_the_engine_has_not_started(process):
    run(process, rows(1))
    answers = process.generate(iter([request(i, SLEEP, 20) for i in range(400)]))
    assert next(c for c in answers if c is not None).id == 0
    answers.close()
    assert len(run(process, rows(1000))) == 1000
    assert process.stats().requests < 1300


def test_a_long_stream_leaves_room_for_a_short_one():
    process = EngineProcess(spec(window_rows=64))
    sent = []

    def endless() -> Iterator[Request]:
        for i in range(100_000):
            sent.append(i)
            yield request(i, SLEEP, 1)

    long = process.generate(endless())
    finished = sum(next(long) is not None for _ in range(100))
    assert len(sent) - finished <= process.window + 1
    answered = threading.Event()

    def short() -> None:
        assert len(run(process, rows(40))) == 40
        answered.set()

    thread = threading.Thread(target=short)
    thread.start()
    for _ in long:
        if answered.is_set():
            break
    long.close()
    thread.join(10)
    assert answered.is_set()
    assert len(sent) < 5000
    process.stop()


def test_the_last_completions_bring_the_final_stats(process):
    run(process, rows(700))
    run(process, rows(77))
    stats = process.stats()
    assert (stats.requests, stats.completions, stats.prompt_tokens) == (777, 777, 7770)


def test_an_idle_engine_costs_nothing_and_ctrl_c_is_its_parents_business(process):
    def cpu_ticks() -> int:
        return sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))

    run(process, rows(10))
    before = cpu_ticks()
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1)
    assert cpu_ticks() - before <= 0.1 * os.sysconf("SC_CLK_TCK")
    first_pid = process.pid
    assert len(run(process, rows(10))) == 10
    assert process.pid == first_pid


def test_the_engine_outlives_the_thread_that_used_it_first(process):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run, process, rows(3)).result()
    pid = process.pid
    time.sleep(0.3)
    assert is_alive(pid)
    run(process, rows(3))
    assert process.pid == pid


def test_the_model_gets_all_cores_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for env, threads in [({}, available_cores()), ({"OMP_NUM_THREADS": "7"}, 7)]:
        process = EngineProcess(spec(), env)
        assert run(process, [request(1, ENVIRONMENT)])[1].token_ids.tolist() == [threads]
        process.stop()


def test_stopping_leaves_no_process_behind(process):
    answers = process.generate(iter([request(1, SLEEP, 30_000)]))
    assert next(answers) is None
    pid = process.pid
    process.stop()
    assert gone_within(pid, 10)
    with pytest.raises(EngineDied, match="stopped"):
        list(answers)


ORPHAN = """
import sys, time
sys.path[:0] = {path!r}
import numpy as np
from batchrun.engine.processes.process import EngineProcess
from batchrun.engine.protocol import EngineSpec, Request
process = EngineProcess(EngineSpec("fake_engines:ObeyingEngine", "", ""))
answers = process.generate(iter([Request(1, np.array([{SLEEP}, 60_000], np.int32), 8)]))
next(answers)
print(process.pid, flush=True)
{then}
"""


@pytest.mark.parametrize(
    ("then", "sign"),
    [("time.sleep(60)", signal.SIGKILL), ("time.sleep(60)", signal.SIGTERM), ("sys.exit()", None)],
    ids=["SIGKILL", "SIGTERM", "exit"],
)
def test_the_engine_is_gone_soon_after_its_parent(then, sign):
    script = ORPHAN.format(path=sys.path, SLEEP=SLEEP, then=then)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid) or sign is None
        if sign:
            parent.send_signal(sign)
        parent.wait(10)
        assert gone_within(pid, 10)


def test_a_real_model_answers_through_the_process_as_it_does_here():
    from batchrun.engine.padded.engine import PaddedEngine

    folder = str(model_folder("llama"))
    real = EngineSpec("padded", folder, folder, max_context=512)
    requests = [request(i, *range(3, 10 + i), limit=5) for i in range(20)]
    process = EngineProcess(real, {"OMP_NUM_THREADS": "1"})
    there = run(process, requests)
    here = {c.id: c for c in PaddedEngine.load(real).generate(iter(requests))}
    assert {i: c.token_ids.tolist() for i, c in there.items()} == {
        i: c.token_ids.tolist() for i, c in here.items()
    }
    stats = process.stats()
    assert (stats.engine, stats.attention, stats.output_tokens) == ("padded", "sdpa", 100)
    assert stats.load_seconds > 0
    process.stop()


ROWS = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 30), st.integers(1, 10**6)), min_size=1)


@given(drawn=ROWS, stream=st.integers(0, 2**20), first=st.integers(0, 2**30))
def test_packed_requests_come_out_as_they_went_in(drawn, stream, first):
    requests = [
        Request(i, np.arange(length, dtype=np.int32), limit, seed)
        for i, (seed, length, limit) in enumerate(drawn)
    ]
    for place, (before, after) in enumerate(
        zip(requests, RequestPack.pack(stream, first, requests).unpack(), strict=True), start=first
    ):
        assert after.id == (stream << 40) + place
        assert after.token_ids.tolist() == before.token_ids.tolist()
        assert (after.max_new_tokens, after.row_seed) == (before.max_new_tokens, before.row_seed)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.sampled_from(["stop", "length"]))))
def test_packed_completions_go_back_to_their_streams(drawn):
    completions = [
        Completion((stream << 40) + place, np.arange(length, dtype=np.int32), reason)
        for place, (stream, length, reason) in enumerate(drawn)
    ]
    pack = CompletionPack.pack(completions, None)
    found = [
        (stream, c.id, len(c.token_ids), c.finish_reason)
        for stream, indices in pack.by_stream()
        for c in pack.unpack(indices, {place: -place for place in range(len(drawn))})
    ]
    expected = [(stream, -place, length, reason) for place, (stream, length, reason) in enumerate(drawn)]
    assert sorted(found) == sorted(expected)


def test_a_process_started_ahead_loads_at_once_and_its_first_use_tells_how_that_failed():
    engine = EngineProcess(EngineSpec("no_such_module:Engine", "the-model", "the-tokenizer"))
    try:
        engine.start()
        pid = engine.pid
        assert gone_within(pid, 30)
        with pytest.raises(JobError, match="cannot be imported"):
            run(engine, rows(1))
        assert engine.pid == pid, "it was not loaded a second time only to be told"
        with pytest.raises(JobError, match="cannot be imported"):
            run(engine, rows(1))
        assert engine.pid != pid, "the next use tries again"
    finally:
        engine.stop()
