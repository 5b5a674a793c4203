"""Rows of one batch with settings of their own, in both engines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import model_folder

from batchrun.engine import seeds
from batchrun.engine.padded.engine import PaddedEngine
from batchrun.engine.paged import PagedEngine
from batchrun.engine.paged.device.compiling import compile_sampler
from batchrun.engine.paged.device.sampler import Sampler
from batchrun.engine.processes.wire import RequestPack
from batchrun.engine.protocol import Completion, EngineSpec, Request, RowSampling, Sampling
from batchrun.engine.tokens.noise import gumbel, signed

BY_ROW = ("temperature", "top_p", "stop")
TEMPERATURES, TOP_PS = (0.0, 0.7, 1.5), (1.0, 0.5)
STOPS = ((), ("a",), ("e", "\n"))
JOB = Sampling(temperature=0.3, top_k=50, seed=9, stop=("zz",))


def rows(count: int = 36) -> list[Request]:
    """Each with settings of its own, but for every fifth, which has the job's."""
    rng = np.random.default_rng(2)
    made = []
    for i in range(count):
        ids = rng.integers(3, 200, int(rng.integers(2, 40))).astype(np.int32)
        own = RowSampling(TEMPERATURES[i % 3], TOP_PS[i % 2], STOPS[i // 3 % 3])
        limit = int(rng.integers(1, 30))
        made.append(Request(i, ids, limit, row_seed=i * 7919, sampling=own if i % 5 else None))
    return made


def engine(kind: str, sampling: Sampling, **options: int) -> PaddedEngine | PagedEngine:
    folder = str(model_folder("llama"))
    spec = EngineSpec(kind, folder, folder, sampling=sampling, max_context=128, stop_token_ids=(2,))
    if kind == "padded":
        return PaddedEngine.load(replace(spec, options=options))
    return PagedEngine.load(replace(spec, options={"cache_tokens": 4096, "max_rows": 16, **options}))


def run(kind: str, sampling: Sampling, requests: list[Request], **options: int) -> dict[int, Completion]:
    return {c.id: c for c in engine(kind, sampling, **options).generate(iter(requests))}


def tokens(found: dict[int, Completion]) -> dict[int, tuple[list[int], str]]:
    return {i: (c.token_ids.tolist(), c.finish_reason) for i, c in found.items()}


@pytest.fixture(scope="module")
def alone() -> dict[int, tuple[list[int], str]]:
    """Each kind of rows as a job of its own has them: settings that are the same for all."""
    found: dict[int, tuple[list[int], str]] = {}
    for temperature, top_p, stop in {(o.temperature, o.top_p, o.stop) for o in map(_of, rows())}:
        mine = [r for r in rows() if _of(r) == RowSampling(temperature, top_p, stop)]
        uniform = replace(JOB, temperature=temperature, top_p=top_p, stop=stop)
        found |= tokens(run("padded", uniform, [replace(r, sampling=None) for r in mine]))
    return found


def _of(request: Request) -> RowSampling:
    return JOB.of(request)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("padded", {}),
        ("padded", {"batch_tokens": 200}),
        ("paged", {"decode_steps": 1}),
        ("paged", {"decode_steps": 16, "max_rows": 5, "cache_tokens": 1024}),
    ],
)
def test_a_row_in_any_batch_has_the_answer_of_a_job_with_its_settings(alone, kind, options):
    found = tokens(run(kind, replace(JOB, by_row=BY_ROW), rows(), **options))
    assert found == alone
    for request in rows():
        assert len(found[request.id][0]) <= request.max_new_tokens
    assert {reason for _, reason in found.values()} == {"stop", "length"}


@pytest.mark.parametrize("kind", ["padded", "paged"])
def test_an_own_temperature_of_0_is_greedy_and_the_job_may_be_greedy_itself(kind):
    greedy = tokens(run(kind, Sampling(), [replace(r, sampling=None) for r in rows(8)]))
    own = [replace(r, sampling=RowSampling(0.0, 0.9, ())) for r in rows(8)]
    assert tokens(run(kind, Sampling(temperature=1.0, by_row=BY_ROW), own)) == greedy
    drawn = [replace(r, sampling=RowSampling(1.0, 1.0, ())) for r in rows(8)]
    assert tokens(run(kind, Sampling(by_row=("temperature",)), drawn)) != greedy


def test_a_begun_row_goes_on_under_its_own_settings(alone):
    for kind in ("padded", "paged"):
        begun = rows()
        for request in begun:
            answer, _ = alone[request.id]
            request.generated = np.array(answer[: request.id % max(1, len(answer))], np.int32)
        assert tokens(run(kind, replace(JOB, by_row=BY_ROW), begun)) == alone


def test_a_seed_of_its_own_is_part_of_the_rows_number():
    positions = torch.arange(6)
    for number, own, seed in [(5, 7, 0), (-3, -1, 9), ((1 << 63) - 1, 0, -(1 << 63))]:
        there = gumbel(own, torch.full((6,), number), positions, 40)
        folded = signed(seeds.of_seed(number, own, seed))
        here = gumbel(seed, torch.full((6,), folded), positions, 40)
        assert torch.equal(there, here)
    assert seeds.of_seed(5, 3, 3) == 5


def test_a_rows_settings_cross_the_border_of_the_process():
    sent = rows(9)
    got = list(RequestPack.pack(1, 0, sent).unpack())
    assert [one.sampling for one in got] == [one.sampling for one in sent]


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), replace(JOB, by_row=BY_ROW)])
def test_the_sampler_can_be_compiled_whole(sampling, monkeypatch):
    monkeypatch.setattr(torch, "compile", _eager(torch.compile))
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    own = torch.tensor([[0.0, 1.0], [1.0, 0.5], [0.7, 0.9]] * 2) if sampling.by_row else None
    given = (logits, torch.arange(6), torch.arange(6), None, own)
    plain, compiled = Sampler(sampling), Sampler(sampling)
    compile_sampler(compiled)
    assert compiled.sample(*given).tolist() == plain.sample(*given).tolist()
    first = [None if x is None else x[:1] for x in given]
    assert compiled.sample(*first).tolist() == plain.sample(*first).tolist()


def _eager(compile):
    return lambda function, **options: compile(function, backend="eager", **options)
