"""What a plan promises of a run: a sample that is like the data, and an estimate that comes true."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, deque
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import batchrun as library
import batchrun.estimate.trial as trial
from batchrun.cli import app
from batchrun.commands.plan import lines, preview
from batchrun.driver.prepare import prepare
from batchrun.engine.padded.batching import by_length, take_batch
from batchrun.engine.protocol import Completion, Request
from batchrun.estimate.cost import Observation, Throughput, estimate, fit
from batchrun.estimate.sample import interval, sample, spread
from batchrun.job.job import Job
from jobs import batchrun, dataset, load, write_job

BUDGET = 4096


def observed(
    law: tuple[float, float], rows: int, prompt: int, output: int, factor: float = 1.0
) -> Observation:
    return Observation(
        rows, rows * prompt, rows * output, factor * rows * (law[0] * prompt + law[1] * output)
    )


@settings(max_examples=60)
@given(
    st.floats(1e-6, 1e-2),
    st.floats(1e-6, 1e-2),
    st.lists(
        st.tuples(st.integers(1, 50), st.integers(1, 2000), st.integers(1, 500)), min_size=3, max_size=8
    ),
)
def test_seconds_that_follow_the_law_give_the_law_back(a, b, shapes):
    seen = [observed((a, b), *shape) for shape in shapes]
    found = fit(seen)
    for o in seen:
        told = found[0] * o.prompt_tokens + found[1] * o.output_tokens
        assert told == pytest.approx(o.seconds, rel=1e-4)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_hours_and_money_are_the_laws_for_so_many_workers_and_uneven_partitions(workers):
    seen = [observed((0.001, 0.01), 10, prompt, 20) for prompt in (50, 100, 400)]
    known = Throughput("a test", "padded", "cpu", seen, True, start_seconds=30.0)
    lengths, runs = np.full(500, 200), np.arange(500) // 5
    about = estimate(known, lengths, runs, 8000, 64, workers, partitions=4, price=3.0)
    busy = 8000 * (0.001 * 200 + 0.01 * 20) * math.ceil(4 / workers) / 4
    for bound in (about.seconds.low, about.seconds.likely, about.seconds.high):
        assert bound == pytest.approx(30 + busy, rel=1e-3)
    assert about.worker_hours.likely == pytest.approx(workers * (30 + busy) / 3600, rel=1e-3)
    assert about.cost.likely == pytest.approx(3 * about.worker_hours.likely)
    assert about.output_tokens.likely == pytest.approx(8000 * 20)
    assert not about.output_bound


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    law, held = (0.001, 0.01), 0
    for draw in range(60):
        noise = rng.normal(1.0, 0.15, 8)
        seen = [observed(law, 10, 60 * i, 30, factor) for i, factor in enumerate(noise, 1)]
        lengths = rng.lognormal(4, 0.8, 400).astype(int)
        known = Throughput("a test", "padded", "cpu", seen, True)
        about = estimate(known, lengths, np.arange(400) // 4, 10_000, 64, 1, 1, seed=draw).seconds
        mean = math.exp(4 + 0.8**2 / 2)
        held += about.low <= 10_000 * (law[0] * mean + law[1] * 30) <= about.high
    assert held >= 45


def test_one_reading_of_other_lengths_gives_an_interval_that_spans_what_it_cannot_tell():
    known = Throughput("a test", "paged", "gpu", [Observation(100, 10_000, 10_000, 10.0)], False)
    lengths, runs = np.full(100, 1000), np.arange(100)
    about = estimate(known, lengths, runs, 100, 10, 1, 1)
    assert about.output_bound
    assert about.seconds.low < 100 * 1010 * 10 / 300_000 * 1.2, "all of it was output's"
    assert about.seconds.high > 100 * 1000 * 10 / 20_000 * 0.8, "both cost the same"


class Clock:
    """Time that passes only where a law says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class LawfulEngine:
    """Rectangles as the padded engine cuts them, each of which takes what a law says of rows, width and steps."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.stats = SimpleNamespace(gauges={"batch_tokens": BUDGET})

    def generate(self, requests: Iterator[Request]) -> Iterator[Completion]:
        waiting = deque(by_length(requests))
        while waiting:
            batch = take_batch(waiting, BUDGET).requests
            outputs = [answer_length(request) for request in batch]
            width = len(batch[0].token_ids)
            self.clock.now += 2e-5 * len(batch) * width + max(outputs) * (4e-3 + 1e-5 * len(batch))
            self.clock.now += 1e-8 * len(batch) * max(outputs) * width  # reads of keys and values
            for request, length in zip(batch, outputs, strict=True):
                yield Completion(request.id, np.zeros(length, np.int32), "stop")


def answer_length(request: Request) -> int:
    """Longer prompts have longer answers, but every row its own."""
    own = int(request.token_ids.sum()) % 97 / 97
    return max(1, min(request.max_new_tokens, int((8 + len(request.token_ids) / 4) * (0.5 + own))))


def prompts_of(lengths: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.integers(0, 1000, length).astype(np.int32) for length in lengths]


@pytest.mark.parametrize(
    ("median", "spread_", "most", "new_tokens"),
    [(30, 0.3, 100, 16), (150, 1.0, 2000, 64), (20, 0.4, 60, 400)],
    ids=["short and short", "long and skewed", "short prompts, long answers"],
)
def test_a_trial_tells_the_whole_jobs_time_within_15_per_cent(median, spread_, most, new_tokens, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(trial, "time", clock)
    rng = np.random.default_rng(2)
    lengths = np.clip(rng.lognormal(math.log(median), spread_, 40_000), 4, most).astype(int)
    whole = [Request(i, p, new_tokens, i) for i, p in enumerate(prompts_of(lengths, rng))]
    engine = LawfulEngine(clock)
    for start in range(0, len(whole), 8192):
        deque(engine.generate(iter(whole[start : start + 8192])), maxlen=0)
    truth = clock.now
    drawn = rng.choice(40_000, 8192, replace=False).tolist()
    seen = trial._batches(engine, [whole[i] for i in drawn], BUDGET, truth / 25, 1, Counter())
    assert sum(o.seconds for o in seen) < truth / 10, "a trial is short"
    known = Throughput("trial", "padded", "cpu", seen, True)
    about = estimate(known, lengths[drawn], np.arange(8192) // 80, 40_000, new_tokens, 1, 1)
    assert about.seconds.likely == pytest.approx(truth, rel=0.15)
    outputs = sum(answer_length(request) for request in whole)
    assert about.output_tokens.likely == pytest.approx(outputs, rel=0.15)


def test_an_engine_without_batches_is_told_by_what_a_longer_stream_adds(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(trial, "time", clock)

    class Ramped:
        def generate(self, requests: Iterator[Request]) -> Iterator[Completion]:
            clock.now += 3.0  # filling up and draining, however many rows there are
            for request in requests:
                clock.now += 0.002 * len(request.token_ids) + 0.01 * 8
                yield Completion(request.id, np.zeros(8, np.int32), "length")

    prompts = prompts_of(np.full(4000, 50), np.random.default_rng(0))
    requests = [Request(i, p, 8, i) for i, p in enumerate(prompts)]
    endings: Counter[str] = Counter()
    (seen,) = trial._streams(Ramped(), requests, 60, 1, endings)
    assert endings.keys() == {"length"}
    assert seen.seconds / seen.rows == pytest.approx(0.18)


def lopsided(folder, rows: int = 3000) -> Job:
    """Two files, a third of the rows in the second; the last fifth of each has texts that are too long."""
    for name, count in (("a", rows * 2 // 3), ("b", rows // 3)):
        texts = [
            ("same " if i % 2 else "other ") + "x" * (700 if i >= count * 4 // 5 else i % 50)
            for i in range(count)
        ]
        pq.write_table(pa.table({"text": texts}), folder / f"{name}.parquet", row_group_size=250)
    return load(folder / "job.yaml", f"input.path={folder}/[ab].parquet", "engine.kind=padded")


def test_a_sample_has_every_kind_of_row_with_the_share_that_it_has(tmp_path, tiny_llama):
    write_job(tmp_path, tiny_llama)
    found = sample(prepare(lopsided(tmp_path)), rows=600)
    assert found.rows == pytest.approx(600, rel=0.05)
    assert not found.complete
    assert found.too_long / found.rows == pytest.approx(0.2, abs=0.04)
    low, high = interval(found.too_long, found.rows)
    assert low < 0.2 < high
    assert set(found.examples()) == {"PROMPT_TOO_LONG"}
    assert len(found.texts) == 5
    cut = sample(prepare(lopsided(tmp_path).model_copy(update={"prompt": prompt_cut(tmp_path)})), rows=600)
    assert (cut.too_long, cut.faults) == (found.too_long, []), "rows that are cut count as too long too"


def prompt_cut(folder):
    return load(folder / "job.yaml", "prompt.truncate=right").prompt


def test_a_small_dataset_is_sampled_whole_and_duplicates_and_beginnings_are_seen(tmp_path, tiny_llama):
    job = load(write_job(tmp_path, tiny_llama))
    found = sample(prepare(job))
    assert found.complete
    assert sorted(map(len, found.prompts)) == sorted(len(text) for text in dataset(60)["text"].to_pylist())
    assert found.duplicates == 0
    pq.write_table(pa.table({"text": ["please answer: yes"] * 40}), tmp_path / "in.parquet")
    again = sample(prepare(job))
    assert again.duplicates == 39
    assert again.shared_prefix == pytest.approx(39 / 40)


@given(st.integers(1, 300), st.integers(1, 300))
def test_any_first_few_places_lie_evenly_among_all(total, taken):
    order = spread(total)
    assert sorted(order) == list(range(total))
    gaps = np.diff(sorted([-1, *order[:taken], total]))
    assert gaps.max() <= 4 * total / min(taken, total) + 2


def test_a_trial_is_remembered_and_what_is_left_is_told_from_the_runs_themselves(
    tmp_path, tiny_llama, cluster, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    job = write_job(tmp_path, tiny_llama, rows=24, cluster={"price_per_gpu_hour": 100.0})
    assert "--trial 60s" in str(lines(preview(load(job))))
    code, out, err = batchrun("plan", str(job), "--trial", "2s", "--gpus", "2", "--json")
    found = json.loads(out)
    told = found["estimate"]
    assert code == 0, err
    assert 6 <= found["cut"]["rows"] == found["cut"]["tried"], "an echo stops nowhere"
    found["cut"] |= {"rows": 2, "share": 0.25}
    assert any(
        "25.0% of the answers were cut at generation.max_new_tokens (2 of" in str(x) for x in lines(found)
    )
    assert told["workers"] == 2
    assert "a trial of" in told["source"]
    lengths = [len(text) for text in dataset(24)["text"].to_pylist()]
    assert told["output_tokens"]["likely"] == pytest.approx(sum(lengths), rel=0.15), "an echo"
    assert told["cost"]["likely"] == pytest.approx(100 * told["worker_hours"]["likely"])
    again = preview(load(job))["estimate"]["source"]
    assert re.fullmatch(rf"{re.escape(told['source'])}, of this job, on \d{{4}}-\d\d-\d\d \d\d:\d\d", again)
    assert preview(load(job, "prompt.template=x{{ text }}"))["estimate"] is None, "too little for another job"
    library.run(load(job, "engine.kind=engines:SecondsEngine"), client=cluster)
    after = preview(load(job))
    assert after["rows_left"] == 0
    assert "earlier runs into this output, 24 rows" in after["estimate"]["source"]
    assert "nothing is left to do" in str(lines(after))


def test_a_time_for_a_trial_that_is_none_is_refused(tmp_path, tiny_llama):
    found = CliRunner().invoke(app, ["plan", str(write_job(tmp_path, tiny_llama)), "--trial", "soon"])
    assert found.exit_code == 2
    assert "'soon' is not a duration" in found.output


def test_rows_that_cannot_be_read_are_named_as_a_run_names_them(tmp_path, tiny_llama):
    """Not as nulls that the template prints."""
    job = write_job(tmp_path, tiny_llama)
    path = tmp_path / "in.parquet"
    pq.write_table(
        dataset(60),
        path,
        row_group_size=30,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    chunk = pq.read_metadata(path).row_group(1).column(1)
    assert chunk.path_in_schema == "text"
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    ((code, (rows, message)),) = sample(prepare(load(job))).examples().items()
    assert (code, rows) == ("INPUT_CORRUPT", 30)
    assert "in.parquet, row group 1" in message
