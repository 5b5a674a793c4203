"""What a run asks of its store before the first task is sent, and that no run slips in between."""

from __future__ import annotations

from typing import Any

import pytest

import batchrun as library
from batchrun.driver import run as driver
from batchrun.errors import ChangedError
from batchrun.output import identity
from batchrun.output.layout import JOB
from batchrun.storage import Folder
from batchrun.storage.local import LocalStore
from jobs import ROWS_OF_JOB, load, write_job

OPERATIONS = ("find", "read", "size", "modified", "put", "create")
TAKE_LEASE, GIVE_LEASE = ["read _job/lease.json", "create _job/lease.json"], ["read _job/lease.json"]


class Sent(Exception):
    """The first task would be sent now."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The driver's requests to the output, those that try the store aside, up to the first task."""
    requests: list[str] = []

    def counted(operation: str) -> Any:
        ask = getattr(LocalStore, operation)

        def request(store: LocalStore, key: str, *more: Any) -> Any:
            if "probe-" not in key:
                requests.append(f"{operation} {key}")
            return ask(store, key, *more)

        return request

    for operation in OPERATIONS:
        monkeypatch.setattr(LocalStore, operation, counted(operation))
    return requests


def finish(*anything: Any) -> None:
    raise Sent


def start(job: Any, *overrides: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "finish", finish)
        with pytest.raises(Sent):
            library.run(load(job, *overrides), client=object())


def test_the_start_of_a_new_output_asks_the_store_no_question_twice(tmp_path, tiny_llama, asked):
    start(write_job(tmp_path, tiny_llama))
    assert asked == [
        *(f"read {JOB}", "find "),
        *TAKE_LEASE,
        *("find _job/plans", "create _job/plans/00000.parquet", f"create {JOB}", "find "),
        *GIVE_LEASE,
    ]


def test_a_run_that_goes_on_reads_the_stored_job_once_and_once_more_under_its_lease(
    tmp_path, tiny_llama, cluster, asked
):
    job = write_job(tmp_path, tiny_llama)
    library.run(load(job), client=cluster)
    asked.clear()
    assert library.run(load(job), client=object()).rows == ROWS_OF_JOB
    complete = [f"read {JOB}", "read _job/manifest.json", "find "]
    assert asked == complete
    next((tmp_path / "out/data").iterdir()).unlink()
    asked.clear()
    start(job)
    assert asked == [*complete, *TAKE_LEASE, f"read {JOB}", "find _job/plans", "find ", *GIVE_LEASE]


@pytest.mark.parametrize("between", ["another job", "nothing any more"])
def test_what_came_between_the_first_look_and_the_lease_is_seen(tmp_path, tiny_llama, monkeypatch, between):
    job = write_job(tmp_path, tiny_llama)
    start(job)
    place = Folder(str(tmp_path / "out"))
    pinned = place.read(JOB)
    start(job, "generation.seed=3", f"output.path={tmp_path / 'other'}")
    others = Folder(str(tmp_path / "other")).read(JOB)
    first_look = driver.try_prompt

    def meanwhile(prepared: Any) -> None:
        first_look(prepared)
        place.delete(place.list())
        if between == "another job":
            place.put(JOB, others)

    monkeypatch.setattr(driver, "try_prompt", meanwhile)
    if between == "another job":
        with pytest.raises(ChangedError, match=r"generation\.seed: 3 -> 0"):
            library.run(load(job), client=object())
        assert place.read(JOB) == others
        return
    start(job)
    again = identity.read(place)
    assert again is not None
    assert again.job_hash.encode() in pinned, "the same job"
    assert place.list("_job/plans/")
