"""The whole runner against an S3 server on this machine: data, answers and every conditional put over the wire."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client

import batchrun
from batchrun.commands.status import status
from batchrun.commands.verify import verify
from batchrun.errors import ChangedError, Interrupted
from batchrun.job.job import Job
from batchrun.telemetry.progress import Progress
from jobs import dataset, load, write_job

ROWS = 60
OPTIONS: dict[str, Any] = {"key": "planted-key", "secret": "planted-secret"}


@pytest.fixture
def store(endpoint: str) -> Any:
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=OPTIONS["key"],
        aws_secret_access_key=OPTIONS["secret"],
    )
    client.create_bucket(Bucket="lake")
    yield client
    for found in client.list_objects_v2(Bucket="lake").get("Contents", []):
        client.delete_object(Bucket="lake", Key=found["Key"])


@pytest.fixture
def job(tmp_path: Path, tiny_llama: Path, endpoint: str, store: Any) -> Job:
    options = {**OPTIONS, "endpoint_url": endpoint}
    path = write_job(
        tmp_path,
        tiny_llama,
        input={"path": "s3://lake/in/*.parquet", "storage_options": options},
        output={"path": "s3://lake/out", "storage_options": options},
    )
    store.upload_file(str(tmp_path / "in.parquet"), "lake", "in/a.parquet")
    return load(path)


def keys(store: Any) -> dict[str, str]:
    found = store.list_objects_v2(Bucket="lake", Prefix="out/").get("Contents", [])
    return {entry["Key"]: entry["ETag"] for entry in found}


def check_complete(store: Any) -> None:
    parts = [key for key in sorted(keys(store)) if key.startswith("out/data/")]
    bodies = [store.get_object(Bucket="lake", Key=key)["Body"].read() for key in parts]
    table = pa.concat_tables([pq.read_table(pa.BufferReader(body)) for body in bodies])
    expected = dataset(ROWS)
    assert table.select(expected.column_names).equals(expected)
    assert table["answer"].to_pylist() == expected["text"].to_pylist()


def test_a_run_on_s3_is_exact_and_a_second_one_writes_nothing(job: Job, store: Any, cluster: Client) -> None:
    result = batchrun.run(job, client=cluster)
    assert (result.ok, result.failed, result.requests) == (ROWS, 0, ROWS)
    check_complete(store)
    before = keys(store)
    assert not [key for key in before if "/stage/" in key or "lease" in key or "probe" in key]
    assert batchrun.run(job, client=cluster).requests == 0
    assert keys(store) == before
    assert verify(job).found.passed
    assert status(job).complete
    frame = result.to_dask().compute(scheduler="synchronous")
    assert frame["answer"].tolist() == dataset(ROWS)["text"].to_pylist()
    for key in before:
        body = store.get_object(Bucket="lake", Key=key)["Body"].read()
        assert b"planted-" not in body, key


def test_a_stopped_run_on_s3_goes_on_from_its_chunks(job: Job, store: Any, cluster: Client) -> None:
    stop = threading.Event()

    def on_progress(progress: Progress) -> None:
        if progress.rows_done:
            stop.set()

    slow = job.model_copy(update={"engine": job.engine.model_copy(update={"kind": "engines:SecondsEngine"})})
    with pytest.raises(Interrupted):
        batchrun.run(slow, client=cluster, stop=stop, on_progress=on_progress)
    assert [key for key in keys(store) if "/stage/" in key]
    result = batchrun.run(job, client=cluster)
    assert result.reused > 0
    assert result.requests + result.reused <= ROWS
    check_complete(store)
    assert not [key for key in keys(store) if "/stage/" in key]


def test_an_object_replaced_on_s3_refuses_the_run(
    job: Job, store: Any, cluster: Client, tmp_path: Path
) -> None:
    batchrun.run(job, client=cluster)
    pq.write_table(dataset(ROWS + 1), tmp_path / "in.parquet")
    store.upload_file(str(tmp_path / "in.parquet"), "lake", "in/a.parquet")
    with pytest.raises(ChangedError, match=r"in/a\.parquet"):
        batchrun.run(job, client=cluster)
