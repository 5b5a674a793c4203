"""An engine over two ranks ends as one, whichever of them dies or stops, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
import warm
from faulty_rank import SILENT_SECONDS
from tiny_models import MAX_CONTEXT

from batchrun.engine.paged.parallel import ranks
from batchrun.engine.paged.parallel.ranks import GRACE_SECONDS
from batchrun.engine.processes.process import EngineProcess
from batchrun.engine.processes.rank_messages import PULSE_SECONDS, STUCK_SECONDS
from batchrun.engine.processes.rank_messages import SILENT_SECONDS as SILENT
from batchrun.engine.protocol import Completion, EngineSpec, Request
from batchrun.errors import EngineError, EngineNotLoaded

NEW = 200


def _requests(count: int) -> list[Request]:
    rng = np.random.default_rng(1)
    return [Request(i, rng.integers(3, 259, 20).astype(np.int32), NEW) for i in range(count)]


def _children(pid: int) -> list[int]:
    """Those that are programs of their own already: one that is paused before is waited for by whoever starts it."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [
        child
        for task in tasks
        for child in map(int, task.read_text().split())
        if _words(child) != _words(pid)
    ]


def _words(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture(scope="module")
def process(tiny_llama: Path) -> Iterator[EngineProcess]:
    options = {"max_rows": 4, "decode_steps": 2, "tables": bytes(1 << 22)}
    folder = str(tiny_llama)
    spec = EngineSpec("faulty_ranks:Engine", folder, folder, max_context=MAX_CONTEXT, options=options, gpus=2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        warm.fork_engines(monkeypatch)
        engine = EngineProcess(spec, {SILENT_SECONDS: "8"})
        yield engine
        engine.stop()


def test_what_says_nothing_is_given_up_within_a_minute() -> None:
    assert SILENT + 2 * PULSE_SECONDS + GRACE_SECONDS < 60
    assert STUCK_SECONDS + 2 * PULSE_SECONDS + GRACE_SECONDS < 60


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> SimpleQueue[EngineError]:
    """What this process would end with as rank 0."""
    ended: SimpleQueue[EngineError] = SimpleQueue()

    def end(error: EngineError) -> None:
        ended.put(error)
        threading.Event().wait()

    for name, value in {
        "PULSE_SECONDS": 0.1, "SILENT_SECONDS": 1, "STUCK_SECONDS": 1, "GRACE_SECONDS": 0.1, "abort": end,
    }.items():  # fmt: skip
        monkeypatch.setattr(ranks, name, value)
    return ended


def test_a_paused_rank_is_noticed_while_a_batch_that_it_does_not_read_is_sent(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, ended: SimpleQueue[EngineError]
) -> None:
    monkeypatch.setattr(ranks, "PROGRAM", "silent_rank")
    group = ranks.Ranks(EngineSpec("paged", str(tiny_llama), str(tiny_llama), gpus=2), 16)
    batch = bytes(1 << 22)
    threading.Thread(target=group._others[0].send, args=(batch,), daemon=True).start()
    assert "rank 1 of 2 has said nothing" in str(ended.get(timeout=30))
    group.close()


def test_ranks_of_which_none_gets_on_with_loading_are_noticed(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, ended: SimpleQueue[EngineError]
) -> None:
    monkeypatch.setattr(ranks, "PROGRAM", "idle_rank")
    monkeypatch.setattr(ranks, "SILENT_SECONDS", 30)
    group = ranks.Ranks(EngineSpec("paged", str(tiny_llama), str(tiny_llama), gpus=2), 16)
    # Threads of other tests' clusters read files.
    group.group.progress.has_read()
    with group.waiting("loading"):
        assert "none of 2 ranks got on with loading for 1 s" in str(ended.get(timeout=30))
    group.close()


def test_a_rank_that_is_paused_while_it_loads_ends_the_group_and_the_next_one_loads(
    process: EngineProcess,
) -> None:
    loading: list[BaseException] = []

    def load() -> None:
        try:
            process.load()
        except EngineError as error:
            loading.append(error)

    caller = threading.Thread(target=load)
    caller.start()
    began = time.monotonic()
    while not (process.pid and (others := _children(process.pid))):
        assert time.monotonic() - began < 30
        time.sleep(0.02)
    # It has not read yet what it is part of, which is large: rank 0 waits for that.
    group = (process.pid, *others)
    os.kill(group[1], signal.SIGSTOP)
    caller.join(60)
    assert not caller.is_alive(), "nobody noticed"
    (error,) = loading
    assert isinstance(error, EngineNotLoaded)
    assert "EngineError: rank 1 of 2 has said nothing for 8.0 s" in str(error)
    while not all(map(_gone, group)):
        assert time.monotonic() - began < 60, "a process is left"
        time.sleep(0.05)
    rows = [c for c in process.generate(iter(_requests(2))) if c is not None]
    assert [len(c.token_ids) for c in rows] == [NEW, NEW]


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_group_ends_with_any_of_its_ranks_and_is_started_again(
    process: EngineProcess, rank: int, sign: signal.Signals
) -> None:
    answered: list[Completion] = []
    error: list[BaseException] = []
    before = process.launches

    def run() -> None:
        try:
            answered.extend(c for c in process.generate(iter(_requests(400))) if c is not None)
        except EngineError as raised:
            error.append(raised)

    process.load()
    caller = threading.Thread(target=run)
    caller.start()
    done = process.stats().output_tokens
    while process.stats().output_tokens == done and caller.is_alive():
        time.sleep(0.05)
    assert not error
    engine = process.stats().pid
    (other,) = _children(engine)
    began = time.monotonic()
    os.kill((engine, other)[rank], sign)
    caller.join(30)
    assert not caller.is_alive(), "nobody noticed"
    assert error
    if rank == 1 and sign == signal.SIGKILL:
        assert "rank 1 of 2" in str(error[0]) or "Connection" in str(error[0]), error
    while not (_gone(engine) and _gone(other)):
        assert time.monotonic() - began < 30, "a process is left"
        time.sleep(0.05)
    rows = [c for c in process.generate(iter(_requests(2))) if c is not None]
    assert [len(c.token_ids) for c in rows] == [NEW, NEW]
    assert process.launches > before
