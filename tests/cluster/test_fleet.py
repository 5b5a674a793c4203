"""Several machines in small: workers with addresses of their own, object storage between them, and real kills."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fleet import fleet, has_second_loopback, host_of, wait_until

from jobs import batchrun, dataset, start, write_job

ROWS = 80
KEYS = {"key": "test-key", "secret": "test-secret"}


class Lake:
    """The bucket that driver and workers share."""

    def __init__(self, endpoint: str) -> None:
        own = {"aws_access_key_id": KEYS["key"], "aws_secret_access_key": KEYS["secret"]}
        self.client: Any = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **own)
        self.client.create_bucket(Bucket="fleet")
        self.options = {**KEYS, "endpoint_url": endpoint}

    def keys(self, prefix: str = "out/") -> list[str]:
        found = self.client.list_objects_v2(Bucket="fleet", Prefix=prefix).get("Contents", [])
        return sorted(entry["Key"] for entry in found)

    def table(self, prefix: str) -> pa.Table:
        bodies = [self.client.get_object(Bucket="fleet", Key=key)["Body"].read() for key in self.keys(prefix)]
        return pa.concat_tables([pq.read_table(pa.BufferReader(body)) for body in bodies])


def write_lake_job(folder: Path, model: Path, lake: Lake) -> Path:
    job = write_job(
        folder,
        model,
        rows=ROWS,
        input={"path": "s3://fleet/in/*.parquet", "storage_options": lake.options},
        output={"path": "s3://fleet/out", "storage_options": lake.options, "rows_per_part": 10},
    )
    lake.client.upload_file(str(folder / "in.parquet"), "fleet", "in/a.parquet")
    return job


@pytest.mark.timeout(600)
@pytest.mark.skipif(not has_second_loopback(), reason="127.0.0.2 is not an address of this machine")
def test_a_killed_worker_and_a_killed_driver_on_two_hosts_cost_no_row_and_repeat_none(
    tmp_path: Path, tiny_llama: Path, endpoint: str
) -> None:
    lake = Lake(endpoint)
    job = write_lake_job(tmp_path, tiny_llama, lake)
    log = tmp_path / "requests"
    log.mkdir()
    engine = {"BATCHRUN_TEST_LOG": str(log), "BATCHRUN_TEST_DELAY": "0.15"}
    with fleet(tmp_path / "logs") as one:
        one.worker("127.0.0.1", **engine)
        other = one.worker("127.0.0.2", **engine)
        one.wait_for(2)
        assert {host_of(address) for address in one.workers()} == {"127.0.0.1", "127.0.0.2"}

        run = start("run", str(job), "--address", one.address)
        wait_until(lambda: len(list(log.iterdir())) == 2 and lake.keys("out/_job/stage/"), "no worker began")
        os.killpg(other.pid, signal.SIGKILL)  # nanny, worker and engine: the machine is gone
        committed = len(lake.keys("out/data/"))
        wait_until(lambda: len(lake.keys("out/data/")) > committed, "the run does not go on without it")
        assert run.poll() is None, run.communicate()
        run.kill()
        run.communicate()
        assert lake.keys("out/data/")
        assert not lake.keys("out/_job/manifest.json")

        one.worker("127.0.0.2", **engine)
        one.wait_for(2)
        code, out, err = batchrun("run", str(job), "--address", one.address, "--json")
        assert code == 0, err
        result = json.loads(out)
        assert (result["rows"], result["ok"], result["failed"]) == (ROWS, ROWS, 0)
        assert 0 < result["requests"] < ROWS, "what the killed run had committed is not generated again"

    table, expected = lake.table("out/data/"), dataset(ROWS)
    assert table.select(expected.column_names).equals(expected)
    assert table["answer"].to_pylist() == expected["text"].to_pylist()
    code, out, err = batchrun("verify", str(job), "--json")
    assert (code, json.loads(out)["passed"]) == (0, True), err
    assert not lake.keys("out/_job/stage/")
