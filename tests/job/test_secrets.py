"""What a job knows and must not tell: secrets in storage options, in the environment and in URLs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import pytest
import stores

from batchrun.errors import JobError
from batchrun.job.job import Job
from jobs import batchrun, write_job

SECRETS = {
    "PLANTED_KEY": "AKIAPLANTEDKEYZq7xK",
    "PLANTED_SECRET": "planted/Secret+Zq7xK==",
    "PLANTED_TOKEN": "planted-session-token-Zq7xK",
}


@pytest.fixture(scope="module")
def bucket(endpoint: str) -> Any:
    stores.s3_bucket(endpoint, "testing", "testing")
    return boto3.resource(
        "s3", "us-east-1", endpoint_url=endpoint, aws_access_key_id="x", aws_secret_access_key="x"
    ).Bucket(stores.BUCKET)


def planted_job(folder: Path, model: Path, endpoint: str) -> Path:
    options = {
        "key": "${PLANTED_KEY}", "secret": "${PLANTED_SECRET}", "token": "${PLANTED_TOKEN}",
        "client_kwargs": {"endpoint_url": endpoint, "region_name": "us-east-1"},
    }  # fmt: skip
    return write_job(
        folder,
        model,
        rows=20,
        input={"path": f"s3://{stores.BUCKET}/secrets/in.parquet", "storage_options": options},
        output={"path": f"s3://{stores.BUCKET}/secrets/out", "storage_options": options},
    )


def check_silence(*places: str | bytes) -> None:
    for place in places:
        text = place if isinstance(place, bytes) else place.encode()
        assert b"lanted" not in text
        assert b"Zq7xK" not in text
        assert b"PLANTED" not in text.replace(b"PLANTED_", b"")


def test_no_file_and_no_line_of_a_run_holds_a_secret(
    bucket: Any, endpoint: str, tiny_llama: Path, tmp_path: Path
) -> None:
    path = planted_job(tmp_path, tiny_llama, endpoint)
    bucket.upload_file(str(tmp_path / "in.parquet"), "secrets/in.parquet")
    for command in ("run", "status"):
        code, out, err = batchrun(command, str(path), "--debug", "--json", **SECRETS)
        assert code == 0, err
        check_silence(out, err)
    found = {entry.key: entry.get()["Body"].read() for entry in bucket.objects.filter(Prefix="secrets/out/")}
    assert {
        "secrets/out/_job/job.json",
        "secrets/out/_job/plans/00000.parquet",
        "secrets/out/_job/manifest.json",
    } <= set(found)
    check_silence(*found, *found.values())


@pytest.mark.parametrize("wrong", ["no server", "no input", "bad option"])
def test_no_error_holds_a_secret(
    wrong: str, bucket: Any, endpoint: str, tiny_llama: Path, tmp_path: Path
) -> None:
    path = planted_job(tmp_path, tiny_llama, endpoint)
    bucket.upload_file(str(tmp_path / "in.parquet"), "secrets/in.parquet")
    override = {
        "no server": ["--set", "input.storage_options.client_kwargs.endpoint_url=http://127.0.0.1:9"],
        "no input": ["--set", "input.path=s3://answers/nothing/*.parquet"],
        "bad option": ["--set", "output.storage_options.unknown_option=${PLANTED_SECRET}"],
    }[wrong]
    code, out, err = batchrun("run", str(path), "--debug", *override, **SECRETS)
    assert code in (1, 2, 4), out
    assert "error: " in err
    check_silence(out, err)


@pytest.mark.parametrize(
    "url",
    [
        "sftp://me:planted-Zq7xK@host/in.parquet",
        "https://host/in.parquet?X-Amz-Signature=plantedZq7xK",
        "https://host/in.parquet?sv=2024&sig=plantedZq7xK",
        "https://:plantedZq7xK@host/in.parquet",
    ],
)
@pytest.mark.parametrize("key", ["input.path", "output.path", "model.name"])
def test_a_secret_in_a_url_is_refused_without_being_shown(url: str, key: str) -> None:
    text = "input: {path: a}\nprompt: {template: x}\nmodel: {name: m}\noutput: {path: b}\n"
    with pytest.raises(JobError, match="password or signature in its URL") as caught:
        Job.parse(text, [f"{key}={url}"])
    check_silence(str(caught.value))


@pytest.mark.parametrize(
    "url", ["s3://lake/day=3/part-?.parquet", "gs://lake/a?b/*.parquet", "sftp://me@host/in"]
)
def test_a_url_without_secrets_is_fine(url: str) -> None:
    text = "input: {path: a}\nprompt: {template: x}\nmodel: {name: m}\noutput: {path: b}\n"
    assert Job.parse(text, [f"input.path={url}"]).input.path == url
