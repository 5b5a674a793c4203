"""An answer that was begun elsewhere goes on as if it had never been interrupted."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import warm
from tiny_models import model_folder

from batchrun.engine.padded.engine import PaddedEngine
from batchrun.engine.paged import PagedEngine
from batchrun.engine.processes.process import EngineProcess
from batchrun.engine.protocol import Completion, Engine, EngineSpec, Request, Sampling
from batchrun.errors import FaultCode

NEW = 24
SAMPLINGS = {
    "greedy": Sampling(),
    "seeded": Sampling(temperature=1.5, top_k=40, seed=3),
    "penalized": Sampling(repetition_penalty=1.4),
    "stopped": Sampling(temperature=2.0, seed=5, stop=("a", "e")),
}


def spec(sampling: Sampling, kind: str = "padded", model: str = "llama", **options: Any) -> EngineSpec:
    folder = str(model_folder(model))
    return EngineSpec(kind, folder, folder, sampling=sampling, max_context=512, options=options)


def make(kind: str, spec: EngineSpec) -> Engine:
    if kind == "padded":
        return PaddedEngine.load(spec)
    return PagedEngine.load(replace(spec, options={"cache_tokens": 4096, "max_rows": 16, "decode_steps": 4}))


def requests(count: int = 12) -> list[Request]:
    rng = np.random.default_rng(1)
    return [
        Request(i, rng.integers(3, 200, int(rng.integers(4, 30))).astype(np.int32), NEW, row_seed=i * 7919)
        for i in range(count)
    ]


def run(engine: Engine, rows: list[Request]) -> dict[int, Completion]:
    return {c.id: c for c in engine.generate(iter(rows))}


@pytest.mark.parametrize("kind", ["padded", "paged"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_begun_answer_ends_in_the_same_tokens(kind, sampling):
    engine = make(kind, spec(SAMPLINGS[sampling]))
    whole = run(engine, requests())
    assert sampling != "stopped" or {c.finish_reason for c in whole.values()} == {"stop", "length"}
    begun = requests()
    for request in begun:
        answer = whole[request.id].token_ids
        request.generated = answer[: (request.id * 5) % max(1, len(answer))]
    before = engine.stats.output_tokens
    again = run(engine, begun)
    for request in begun:
        assert again[request.id].token_ids.tolist() == whole[request.id].token_ids.tolist(), request.id
        assert again[request.id].finish_reason == whole[request.id].finish_reason
    saved = sum(len(request.generated) for request in requests_begun(whole))
    total = sum(len(c.token_ids) for c in whole.values())
    assert engine.stats.output_tokens - before == total - saved, "only new tokens are counted"


def requests_begun(whole: dict[int, Completion]) -> list[Request]:
    return [
        replace(r, generated=whole[r.id].token_ids[: (r.id * 5) % max(1, len(whole[r.id].token_ids))])
        for r in requests()
    ]


@pytest.mark.parametrize("kind", ["padded", "paged"])
def test_an_engine_lets_go_of_cancelled_rows_and_finishes_the_others(kind, monkeypatch):
    import batchrun.engine.padded.engine
    import batchrun.engine.padded.steps
    import batchrun.engine.paged.engine

    monkeypatch.setattr(batchrun.engine.padded.steps, "CANCEL_SECONDS", 0.0)
    monkeypatch.setattr(batchrun.engine.paged.engine, "CANCEL_SECONDS", 0.0)
    engine = make(kind, spec(SAMPLINGS["seeded"]))
    whole = run(engine, requests(40))
    rows = requests(40)
    calls = 0
    own = engine.model.forward if kind == "padded" else engine._runner._forward

    def forward(*args: Any, **kw: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 10:
            for row in rows[::2]:
                row.cancelled = True
        return own(*args, **kw)

    monkeypatch.setattr(
        *((engine.model, "forward") if kind == "padded" else (engine._runner, "_forward")), forward
    )
    found = run(engine, rows)
    assert sorted(found) == list(range(40))
    for i in range(1, 40, 2):
        assert found[i].token_ids.tolist() == whole[i].token_ids.tolist()
    left = [found[i] for i in range(0, 40, 2)]
    assert {c.finish_reason for c in left} == {"cancelled"}
    assert any(0 < len(c.token_ids) < NEW for c in left), "they keep what they have"
    for c in left:
        assert c.token_ids.tolist() == whole[c.id].token_ids[: len(c.token_ids)].tolist()
    begun = [replace(r, generated=found[r.id].token_ids) for r in requests(40)[::2]]
    again = run(engine, begun)
    assert all(again[r.id].token_ids.tolist() == whole[r.id].token_ids.tolist() for r in begun)
    if kind == "paged":
        engine._scheduler.check()


def test_a_model_with_a_decoder_of_its_own_starts_over():
    engine = make("padded", spec(Sampling(), model="t5"))
    whole = run(engine, requests(4))
    begun = [replace(r, generated=np.array([5, 6, 7], np.int32)) for r in requests(4)]
    again = run(engine, begun)
    assert all(again[i].token_ids.tolist() == whole[i].token_ids.tolist() for i in whole)


@pytest.mark.parametrize("kind", ["padded", "paged"])
def test_a_caller_that_leaves_gets_the_tokens_so_far_within_two_seconds(kind, monkeypatch):
    warm.fork_engines(monkeypatch)
    options = {"cache_tokens": 65536, "max_rows": 16} if kind == "paged" else {}
    long = replace(spec(Sampling(), kind, **options), max_context=8000)
    rows = [replace(r, max_new_tokens=6000) for r in requests(8)]
    process = EngineProcess(long, {"OMP_NUM_THREADS": "1"})
    left = 0.0

    def wanted() -> bool:
        nonlocal left
        left = left or (time.monotonic() if process.stats().steps >= 3 else 0.0)
        return not left

    try:
        found = list(process.generate(iter(rows), wanted))
        assert time.monotonic() - left < 10
    finally:
        process.stop()
    kept = [c for c in found if c is not None]
    assert len(kept) == len(rows)
    assert {c.finish_reason for c in kept} == {"cancelled"}
    assert any(len(c.token_ids) for c in kept), "not all of them fit the paged engine's memory at once"


class SmallDevice:
    """In place of an engine's prefill or decode: refuses whatever is larger than it has room for."""

    def __init__(self, own: Any, room: int, size: Any) -> None:
        self.own, self.room, self.size, self.refused = own, room, size, 0

    def __call__(self, work: Any) -> Any:
        if self.size(work) > self.room:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.own(work)


@pytest.mark.parametrize("room", [100, 20])
def test_the_paged_engine_makes_smaller_batches_on_out_of_memory(room):
    engine = make("paged", spec(SAMPLINGS["seeded"]))
    whole = run(engine, requests(30))
    runner = engine._runner
    runner.prefill = SmallDevice(runner.prefill, room, lambda chunks: sum(s.stop - s.start for s in chunks))
    runner.decode = SmallDevice(runner.decode, 3, lambda batch: len(batch.sequences))
    shared = [replace(r, id=100 + r.id, token_ids=np.concatenate([np.full(300, 9, np.int32), r.token_ids])) for r in
              requests(3)]  # fmt: skip
    found = run(engine, [*requests(30), *[replace(r, max_new_tokens=4) for r in shared]])
    assert {i: c.token_ids.tolist() for i, c in found.items() if i < 100} == {
        i: c.token_ids.tolist() for i, c in whole.items()
    }
    assert all(c.finish_reason != "error" for c in found.values())
    assert 0 < runner.prefill.refused < 20
    assert 0 < runner.decode.refused < 5
    assert any("out of memory" in note for note in engine.stats.notes)
    engine._scheduler.check()
    again = make("paged", spec(SAMPLINGS["seeded"]))
    plain = run(again, [replace(r, max_new_tokens=4) for r in shared])
    assert {i: c.token_ids.tolist() for i, c in plain.items()} == {
        i: found[i].token_ids.tolist() for i in plain
    }


@pytest.mark.parametrize("what", ["prefill", "decode"])
def test_a_row_that_never_fits_is_out_of_memory_and_its_neighbours_are_not(what):
    engine = make("paged", spec(Sampling()))
    runner, whole = engine._runner, run(engine, requests(8))

    def poisoned(work: Any) -> int:
        sequences = [s.sequence for s in work] if what == "prefill" else work.sequences
        return int(any(one.request.id == 5 for one in sequences))

    setattr(runner, what, SmallDevice(getattr(runner, what), 0, poisoned))
    found = run(engine, requests(8))
    assert found.pop(5).fault.code == FaultCode.OUT_OF_MEMORY
    assert {i: c.token_ids.tolist() for i, c in found.items()} == {
        i: c.token_ids.tolist() for i, c in whole.items() if i != 5
    }
    engine._scheduler.check()
