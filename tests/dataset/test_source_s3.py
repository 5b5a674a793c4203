"""The same on an S3 store: versions are ETags, and a changed object is seen past s3fs's listing cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import pytest
from tiny import plan_of, rows_of, write

from batchrun.errors import ChangedError, InputError
from batchrun.job.settings import InputSettings


@pytest.fixture
def store(endpoint: str) -> dict[str, Any]:
    return {"key": "k", "secret": "s3cret-value", "endpoint_url": endpoint}


@pytest.fixture
def client(store: dict[str, Any]) -> Any:
    client = boto3.client(
        "s3",
        endpoint_url=store["endpoint_url"],
        aws_access_key_id="k",
        aws_secret_access_key="s3cret-value",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="rows")
    return client


def test_objects_are_planned_read_and_watched(tmp_path: Path, client: Any, store: dict[str, Any]) -> None:
    for i in range(3):
        path = write(tmp_path / "a.parquet", {"n": [i, 10 + i], "text": ["x", "y"]})
        client.put_object(Bucket="rows", Key=f"data/{i}.parquet", Body=path.read_bytes())
    settings = InputSettings(path="s3://rows/data", filters=[["n", ">=", 10]], storage_options=store)
    plan = plan_of(settings, needed=("text",), rows=2)
    assert [f.path for f in plan.files] == [f"s3://rows/data/{i}.parquet" for i in range(3)]
    etags = [client.head_object(Bucket="rows", Key=f"data/{i}.parquet")["ETag"].strip('"') for i in range(3)]
    assert [f.version for f in plan.files] == etags
    assert rows_of(plan, settings)["n"].to_pylist() == [10, 11, 12]
    assert (
        plan_of(settings.model_copy(update={"path": "s3://rows/data/*.parquet"}), ("text",), 2).hash
        == plan.hash
    )
    assert b"s3cret-value" not in plan.to_parquet()

    path = write(tmp_path / "a.parquet", {"n": [2, 99], "text": ["x", "y"]})
    client.put_object(Bucket="rows", Key="data/2.parquet", Body=path.read_bytes())
    with pytest.raises(ChangedError, match=r"s3://rows/data/2\.parquet: changed since"):
        rows_of(plan, settings)
    client.delete_object(Bucket="rows", Key="data/2.parquet")
    with pytest.raises(ChangedError, match="now gone"):
        rows_of(plan, settings)
    assert plan_of(settings).rows == 2


def test_a_missing_bucket_or_key_is_told(client: Any, store: dict[str, Any]) -> None:
    for path in ("s3://nowhere/data", "s3://rows/nothing.parquet", "s3://rows/nothing/*.parquet"):
        with pytest.raises(InputError, match=r"no file matches|cannot be listed") as caught:
            plan_of(InputSettings(path=path, storage_options=store))
        assert path in str(caught.value)
        assert "s3cret-value" not in str(caught.value)
