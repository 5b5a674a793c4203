"""What is remembered of a model's throughput, and which jobs' estimates may rest on it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from batchrun.commands.plan import lines, preview
from batchrun.driver.prepare import Prepared, prepare
from batchrun.estimate import records
from batchrun.estimate.cost import Observation, Throughput
from jobs import load, write_job

OTHER = "another job's hash"
PROMPT = 12  # tokens of this job's prompts, about
MUCH = 5000  # rows that are enough for another job


@pytest.fixture
def prepared(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(records, "device_name", lambda: "a machine")
    return prepare(load(write_job(tmp_path, tiny_llama, rows=24)))


def measured(prepared: Prepared, rows: int, job: str | None, prompt: int = PROMPT) -> Path:
    """A trial of so many rows, or a bench where there is no job, that was remembered."""
    seen = [Observation(rows, rows * prompt, rows * 8, 10.0)]
    known = Throughput(f"{rows} rows", "padded", "a machine", seen, job is not None)
    return records.remember(prepared.model.fingerprint, prepared.job.engine.kind, job, known)


def rests_on(prepared: Prepared) -> str | None:
    known = records.recall(prepared, PROMPT)
    return known and known.source.partition(",")[0]


def test_another_jobs_trial_serves_only_with_enough_work_and_prompts_of_about_this_length(prepared):
    measured(prepared, 20, OTHER)
    assert rests_on(prepared) is None, "too little work"
    measured(prepared, MUCH, "a job of long prompts", prompt=10 * PROMPT)
    measured(prepared, MUCH, "a job of short prompts", prompt=1)
    assert rests_on(prepared) is None, "prompts of other lengths"
    measured(prepared, MUCH, OTHER)
    assert rests_on(prepared) == f"{MUCH} rows"
    known = records.recall(prepared, PROMPT)
    assert known is not None
    assert not known.own_rows, "the answers' lengths are another job's"


def test_this_jobs_own_trial_comes_before_larger_ones_of_others_and_those_before_a_bench(prepared):
    measured(prepared, 9000, None)
    assert rests_on(prepared) == "9000 rows"
    measured(prepared, MUCH, OTHER)
    measured(prepared, MUCH + 1, "a third job's")
    assert rests_on(prepared) == f"{MUCH + 1} rows"
    measured(prepared, 20, prepared.identity.job_hash)
    assert rests_on(prepared) == "20 rows"


def test_a_smaller_trial_overwrites_neither_a_larger_one_of_its_job_nor_another_jobs(prepared):
    own = prepared.identity.job_hash
    kept = measured(prepared, MUCH, own).read_bytes()
    assert measured(prepared, 20, own).read_bytes() == kept
    measured(prepared, 20, OTHER)
    assert rests_on(prepared) == f"{MUCH} rows"
    measured(prepared, MUCH + 1, own)
    assert rests_on(prepared) == f"{MUCH + 1} rows"


def test_a_plan_says_which_trial_its_estimate_rests_on_and_when_it_ran(prepared):
    measured(prepared, MUCH, OTHER)
    told = str(lines(preview(prepared.job)))
    when = r"on \d{4}-\d\d-\d\d \d\d:\d\d"
    assert re.search(
        f"from {MUCH} rows, of another job whose prompts have {PROMPT} tokens on average, {when}", told
    )
    measured(prepared, 20, prepared.identity.job_hash)
    assert re.search(f"from 20 rows, of this job, {when}", str(lines(preview(prepared.job))))


def test_a_trial_that_was_stored_without_its_time_is_still_read(prepared):
    path = measured(prepared, MUCH, prepared.identity.job_hash)
    values: dict[str, Any] = json.loads(path.read_text())
    del values["when"]
    path.unlink()
    old = path.with_name(f"{prepared.model.fingerprint[:16]}-trial-0123456789abcdef.json")
    old.write_text(json.dumps(values))
    os.utime(old, (1_700_000_000, 1_700_000_000))
    known = records.recall(prepared, PROMPT)
    assert known is not None
    assert "of this job, on 2023-11-1" in known.source
    measured(prepared, 20, prepared.identity.job_hash)
    assert rests_on(prepared) == f"{MUCH} rows", "the larger one"
