"""The folder that everything is kept in: local disks, memory, and remote stores on a bad day."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from parts import faulty_folder
from s3fs.errors import translate_boto_error

from batchrun.errors import OutputError, StorageError
from batchrun.storage import Folder, folder, local
from batchrun.storage.faults import is_transient, is_unauthorised
from batchrun.storage.remote import RemoteStore
from batchrun.storage.store import Unconditional


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FIRST_WAIT", 0)


RACE = """
import sys, time
from batchrun.storage import Folder
folder, me = Folder(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
print(*[int(folder.put_if_absent(f"data/{key}", me.encode() * 5000)) for key in range(20)])
"""


def test_processes_race_for_local_keys_and_one_wins_each(tmp_path: Path) -> None:
    runners = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path), str(me)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for me in range(8)
    ]  # fmt: skip
    for runner in runners:
        assert runner.stdout is not None
        assert runner.stdout.readline() == "ready\n"
    wins = []
    for runner in runners:
        assert runner.stdin is not None
        runner.stdin.write("go\n")
        runner.stdin.flush()
    for runner in runners:
        output, _ = runner.communicate(timeout=60)
        wins.append([int(word) for word in output.split()])
    assert [sum(column) for column in zip(*wins, strict=True)] == [1] * 20
    for key in range(20):
        winner = next(me for me in range(8) if wins[me][key])
        assert (tmp_path / "data" / str(key)).read_bytes() == b"%d" % winner * 5000
    assert set(Folder(str(tmp_path)).list()) == {f"data/{key}" for key in range(20)}


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Folder(str(tmp_path))

    def full(path: Path) -> None:
        os.truncate(path, 3)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local, "_sync", full)
    for write in (place.put, place.put_if_absent):
        with pytest.raises(StorageError, match="no space left"):
            write("data/a", b"0123456789")
    assert place.list() == {}


def test_a_disk_without_hard_links_still_never_shows_half_an_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    place = Folder(str(tmp_path))
    assert not place.probe()
    assert place.put_if_absent("data/a", b"first")
    assert not place.put_if_absent("data/a", b"second")
    assert place.list() == {"data/a": 5}


def test_a_read_only_destination_is_refused_with_the_fix() -> None:
    with pytest.raises(OutputError, match=r"cannot be written to: .*; ") as caught:
        Folder("/proc/batchrun-out").probe()
    assert caught.value.fix


def test_a_missing_bucket_is_named() -> None:
    def no_bucket(operation: str, key: str) -> None:
        raise FileNotFoundError("bucket")

    place, store = faulty_folder()
    store.gate = no_bucket
    with pytest.raises(OutputError, match="no such bucket or folder"):
        place.probe()


def test_a_password_in_the_url_is_never_shown() -> None:
    assert Folder("sftp://user:pass@host/out").name == "sftp://host/out"


# Bad days


def test_a_busy_store_is_waited_for() -> None:
    place, store = faulty_folder()
    store.script("put", "a", *["busy", "reset"] * 5)
    store.script("find", "", "busy", "reset")
    place.put("a", b"1")
    assert place.list() == {"a": 1}
    assert store.counts() == {"put": 11, "find": 3}


def test_patience_ends_with_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "PATIENCE", 0.0)
    place, store = faulty_folder()
    store.script("put", "a", "busy", "busy")
    with pytest.raises(StorageError, match="the store kept failing"):
        place.put("a", b"1")


def test_no_space_is_not_waited_for() -> None:
    place, store = faulty_folder()
    store.script("put", "a", "full")
    with pytest.raises(StorageError, match="no space left"):
        place.put("a", b"1")
    assert store.counts() == {"put": 1}


def test_expired_credentials_build_a_new_client_once(monkeypatch: pytest.MonkeyPatch) -> None:
    place, store = faulty_folder()
    place.put("a", b"1")
    clients = []
    build = folder.fsspec.core.url_to_fs
    monkeypatch.setattr(
        folder.fsspec.core, "url_to_fs", lambda *a, **kw: clients.append(1) or build(*a, **kw)
    )
    store.script("read", "a", "denied")
    assert place.read("a") == b"1"
    assert len(clients) == 1
    store.script("read", "a", "denied", "denied")
    with pytest.raises(StorageError, match="access denied"):
        place.read("a")
    assert len(clients) == 2


def test_a_lost_acknowledgement_of_a_create_says_not_known() -> None:
    place, store = faulty_folder()
    store.script("create", "a", "lost")
    assert place.put_if_absent("a", b"1") is False
    assert place.read("a") == b"1"


def test_a_store_that_ignores_conditions_is_found_out() -> None:
    place, store = faulty_folder()
    store.conditional = False
    assert place.probe() is False
    assert place.list() == {}


class Namesakes:
    """A listing as gcsfs gives it of a folder that is not there, and as S3 consoles fill it."""

    protocol = "gs"

    def invalidate_cache(self) -> None:
        pass

    def find(self, path: str, detail: bool) -> dict[str, dict[str, object]]:
        names = ["bucket/out2/data/a", "bucket/out/data/", "bucket/out/data/b"]
        return {name: {"name": name, "size": 1, "type": "file"} for name in names}


def test_a_listing_holds_no_namesakes_and_no_marks_of_folders() -> None:
    assert RemoteStore(Namesakes(), "bucket/out").find("") == {"data/b": 1}


# What the libraries' errors mean


def boto(code: str, status: int, operation: str = "PutObject", **error: str) -> Exception:
    answer = {
        "Error": {"Code": code, "Message": "said", **error},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return translate_boto_error(ClientError(answer, operation))  # type: ignore[arg-type]


class Angry:
    """An fsspec filesystem whose every write fails in one way."""

    protocol = "s3"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def pipe_file(self, path: str, data: bytes, mode: str) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        boto("PreconditionFailed", 412, Condition="If-None-Match"),
        boto("PreconditionFailed", 412),
        boto("412", 412),
    ],
)
def test_every_form_of_a_failed_condition_means_that_the_key_is_there(error: Exception) -> None:
    assert RemoteStore(Angry(error), "bucket/out").create("a", b"1") is False


@pytest.mark.parametrize("error", [boto("NotImplemented", 501), NotImplementedError(), TypeError("mode")])
def test_a_store_that_knows_no_condition_says_so(error: Exception) -> None:
    with pytest.raises(Unconditional):
        RemoteStore(Angry(error), "bucket/out").create("a", b"1")


@pytest.mark.parametrize(
    "error",
    [
        boto("ConditionalRequestConflict", 409),
        boto("SlowDown", 503),
        boto("503", 503),
        boto("InternalError", 500),
        boto("RequestTimeout", 400),
        boto("NoSuchUpload", 404, "CompleteMultipartUpload"),
        boto("TooManyRequests", 429),
        EndpointConnectionError(endpoint_url="http://x"),
        TimeoutError(),
        ConnectionResetError(),
    ],
)
def test_what_may_pass_is_waited_for(error: Exception) -> None:
    assert is_transient(error)
    assert not is_unauthorised(error)


@pytest.mark.parametrize(
    "error",
    [boto("AccessDenied", 403), boto("ExpiredToken", 400), boto("InvalidToken", 400), PermissionError()],
)
def test_what_new_credentials_may_mend_is_not_waited_for(error: Exception) -> None:
    assert is_unauthorised(error)
    assert not is_transient(error)


@pytest.mark.parametrize("error", [boto("NoSuchBucket", 404), boto("InvalidRequest", 400), ValueError()])
def test_what_waiting_cannot_mend_is_final(error: Exception) -> None:
    assert not is_transient(error)
    assert not is_unauthorised(error)
