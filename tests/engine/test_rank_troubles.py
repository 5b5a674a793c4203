"""A rank without memory makes an engine over several smaller. One that never comes to a batch ends it, a slow one does
not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm
from faulty_rank import FAULTS, LOADING, SLOW, STUCK, WARMING_UP
from faulty_ranks import STUCK_SECONDS
from tiny_models import MAX_CONTEXT

from batchrun.engine.paged.device.work import DecodeWork, PrefillWork
from batchrun.engine.processes.process import EngineProcess
from batchrun.engine.protocol import EngineSpec, Request
from batchrun.errors import EngineError, EngineOutOfMemory

NEW = 12


@pytest.fixture(scope="module")
def process(tiny_llama: Path) -> Iterator[EngineProcess]:
    options = {"max_rows": 6, "decode_steps": 2, "prefill_tokens": 128}
    folder = str(tiny_llama)
    spec = EngineSpec("faulty_ranks:Engine", folder, folder, max_context=MAX_CONTEXT, options=options, gpus=2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        warm.fork_engines(monkeypatch)
        process = EngineProcess(spec, {FAULTS: "rows 3 slow 5 read 5", STUCK_SECONDS: "4"})
        yield process
        process.stop()


def _answers(process: EngineProcess, rows: int, first_token: int = 3) -> list[int]:
    rng = np.random.default_rng(1)
    prompts = [np.append(first_token, rng.integers(3, 250, 20)).astype(np.int32) for _ in range(rows)]
    requests = [Request(i, prompt, NEW) for i, prompt in enumerate(prompts)]
    return [len(c.token_ids) for c in process.generate(iter(requests)) if c is not None]


def test_a_rank_without_memory_makes_the_next_engine_smaller_which_does_all_rows(
    process: EngineProcess,
) -> None:
    with pytest.raises(
        EngineOutOfMemory, match=r"rank 1 of 2 is out of memory, engine.max_rows is 3 from now on"
    ):
        _answers(process, 8)
    tokens = process.stats().gauges["pool_tokens"]
    assert _answers(process, 8) == [NEW] * 8
    assert process.launches == 2
    assert process.spec.options["max_rows"] == 3
    assert process.stats().gauges["pool_tokens"] <= tokens


def _prefill(*lengths: int) -> PrefillWork:
    """Of so many sequences, and padding."""
    named: dict[str, Any] = dict.fromkeys(field.name for field in fields(PrefillWork))
    return PrefillWork(**named | {"query_lens": np.array([*lengths, 5])})


def test_batches_become_smaller_down_to_the_row() -> None:
    def decode(rows: int) -> DecodeWork:
        return DecodeWork(np.zeros(rows, np.int32), np.zeros((rows, 1), np.int32), 8, None)

    assert [decode(rows).smaller for rows in (7, 2, 1)] == [{"max_rows": 3}, {"max_rows": 1}, None]
    assert _prefill(100, 28).smaller == {"prefill_tokens": 64}
    assert _prefill(40).smaller == {"prefill_tokens": 20}
    assert _prefill(1, 1).smaller == {"prefill_tokens": 1}
    assert _prefill(31).smaller is None
    assert _prefill(1).smaller is None


def test_a_rank_that_takes_long_over_a_batch_or_over_its_weights_is_waited_for(
    process: EngineProcess,
) -> None:
    assert _answers(process, 2, SLOW) == [NEW] * 2


def test_a_rank_that_never_gets_further_with_loading_ends_the_engine(process: EngineProcess) -> None:
    """Whether it never joins the others or never comes to the warm-up; both at the same time, to be fast."""

    def load(stage: int) -> str:
        engine = EngineProcess(process.spec, {FAULTS: f"hangs {stage}", STUCK_SECONDS: "4"})
        try:
            engine.load()
        except EngineError as error:
            return str(error)
        finally:
            engine.stop()
        return "loaded"

    with ThreadPoolExecutor() as pool:
        for error in pool.map(load, (LOADING, WARMING_UP)):
            assert "none of 2 ranks got on with loading for 4.0 s" in error


def test_a_rank_that_never_comes_to_a_batch_ends_the_engine(process: EngineProcess) -> None:
    process.load()
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"none of 2 ranks got on with a batch for 4.0 s"):
        _answers(process, 2, STUCK)
    assert time.monotonic() - began < 30
