"""The same promises on S3's protocol, through s3fs, against a server on this machine."""

from __future__ import annotations

import functools
import itertools
import os
import threading

import botocore.session
import pytest
from parts import commit, layout

from batchrun.errors import OutputError, StorageError
from batchrun.output import clean
from batchrun.storage import Folder, folder

BUCKET = "answers"
_names = itertools.count()


@pytest.fixture(scope="module")
def options(endpoint: str) -> dict[str, object]:
    client = client_of(endpoint)
    client.create_bucket(Bucket=BUCKET)
    return {
        "key": "testing",
        "secret": "testing",
        "client_kwargs": {"endpoint_url": endpoint, "region_name": "us-east-1"},
    }


def client_of(endpoint: str) -> object:
    return botocore.session.get_session().create_client(
        "s3", "us-east-1", endpoint_url=endpoint, aws_access_key_id="testing", aws_secret_access_key="testing"
    )


@pytest.fixture
def place(options: dict[str, object]) -> Folder:
    return Folder(f"s3://{BUCKET}/run-{next(_names)}", options)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(folder, "PATIENCE", 60.0)


def wrap_client(place: Folder, method: str, around: object) -> None:
    """Puts `around(original, **kw)`, a coroutine, in place of one method of the folder's S3 client."""
    fs = folder._store(place.url, place.storage_options).fs  # type: ignore[attr-defined]
    fs.connect()
    original = getattr(fs._s3, method)

    @functools.wraps(original)
    async def wrapped(**kw: object) -> object:
        return await around(original, **kw)  # type: ignore[operator]

    setattr(fs._s3, method, wrapped)


def test_a_multipart_upload_is_conditional_too(place: Folder, tmp_path: object) -> None:
    path = tmp_path / "big"  # type: ignore[operator]
    path.write_bytes(os.urandom(1 << 20) * 101)
    place.put("data/a", b"first")
    uploads: list[str] = []

    async def count(original: object, **kw: object) -> object:
        uploads.append(str(kw["Key"]))
        return await original(**kw)  # type: ignore[operator]

    wrap_client(place, "create_multipart_upload", count)
    assert not place.put_if_absent("data/a", path)
    assert place.put_if_absent("data/b", path)
    assert len(uploads) == 2
    assert place.list("data/") == {"data/a": 5, "data/b": 101 << 20}
    assert place.abort_uploads() == 0


def test_a_lost_acknowledgement_of_a_multipart_upload_is_not_known(place: Folder, tmp_path: object) -> None:
    path = tmp_path / "big"  # type: ignore[operator]
    path.write_bytes(bytes(101 << 20))
    lost = iter([True])

    async def lose(original: object, **kw: object) -> object:
        result = await original(**kw)  # type: ignore[operator]
        if next(lost, False):
            raise ConnectionResetError("the answer was lost")
        return result

    wrap_client(place, "complete_multipart_upload", lose)
    assert place.put_if_absent("data/a", path) is False
    assert place.size("data/a") == 101 << 20


def test_cleaning_aborts_the_uploads_below_the_folder_only(place: Folder, options: dict[str, object]) -> None:
    client = client_of(options["client_kwargs"]["endpoint_url"])  # type: ignore[index]
    prefix = place.url.removeprefix(f"s3://{BUCKET}/")
    client.create_multipart_upload(Bucket=BUCKET, Key=f"{prefix}/data/a")  # type: ignore[attr-defined]
    client.create_multipart_upload(Bucket=BUCKET, Key="elsewhere/data/a")  # type: ignore[attr-defined]
    clean.delete(place, [])
    left = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])  # type: ignore[attr-defined]
    assert [upload["Key"] for upload in left] == ["elsewhere/data/a"]


def test_an_unreachable_store_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "PROBE_PATIENCE", 0.0)
    options = {
        "key": "x", "secret": "hidden-secret", "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"retries": {"total_max_attempts": 1}},
    }  # fmt: skip
    place = Folder(f"s3://{BUCKET}/out", options)
    folder._store(place.url, options).fs.retries = 1  # type: ignore[attr-defined]
    with pytest.raises(OutputError) as caught:
        place.probe()
    assert "hidden-secret" not in str(caught.value)
    monkeypatch.setattr(folder, "PATIENCE", 0.0)
    with pytest.raises(StorageError, match="the store kept failing"):
        place.read("a")


def test_how_many_requests_a_partition_costs_on_s3(place: Folder) -> None:
    fs = folder._store(place.url, place.storage_options).fs  # type: ignore[attr-defined]
    fs.connect()
    requests: list[str] = []
    lock = threading.Lock()

    def note(model: object, **kw: object) -> None:
        with lock:
            requests.append(model.name)  # type: ignore[attr-defined]

    fs._s3.meta.events.register("before-call.s3", note)
    commit(place, layout(1), 0, 6)
    assert requests == ["ListObjectsV2", "HeadObject", "PutObject", "HeadObject"]
