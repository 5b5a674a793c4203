"""The same promises on every kind of store, each a real server on this machine where there is one."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stores
from parts import (
    JOB_HASH,
    SCHEMA,
    answers,
    attempt,
    carried,
    commit,
    faulty_folder,
    layout,
    output,
    unique,
)
from stores import Place, s3_bucket
from wire import Wire, answer, wire

from batchrun.errors import OutputError
from batchrun.output import clean, manifest, state, verify
from batchrun.output.identity import Identity, pin
from batchrun.output.lease import Lease
from batchrun.storage import Folder, NotFound, folder

REMOTE = ["moto", "ministack", "s3rver", "azurite", "gcs"]
STORES = ["local", "memory", "faulty", *REMOTE]
_names = itertools.count()


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The store that the test is about."""
    name, folder_of_its_own = request.param, tmp_path_factory.mktemp("store")
    with ExitStack() as stack:
        if name == "local":
            yield Place(str(folder_of_its_own))
        elif name == "memory":
            yield Place(f"memory://{unique()}")
        elif name == "faulty":
            yield Place(faulty_folder()[0].url)
        elif name == "moto":
            yield s3_bucket(request.getfixturevalue("endpoint"), "testing", "testing")
        elif name in ("s3rver", "azurite"):
            yield stack.enter_context(getattr(stores, name)(folder_of_its_own))
        else:
            yield stack.enter_context(getattr(stores, name)())


@pytest.fixture
def place(running: Place) -> Folder:
    return Folder(f"{running.url}/run-{next(_names)}", running.options)


@pytest.fixture
def between(running: Place) -> Iterator[Wire]:
    with wire(running.address) as spoiling:
        yield spoiling


@pytest.fixture
def far(running: Place, between: Wire) -> Folder:
    """A folder behind the proxy."""
    return Folder(f"{running.url}/run-{next(_names)}", running.through(between.address).options)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(folder, "PATIENCE", 10.0)


@pytest.fixture
def _hasty_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Azure's library waits 15 s before its first retry of its own."""
    policies = pytest.importorskip("azure.storage.blob._shared.policies_async")
    monkeypatch.setattr(policies.ExponentialRetry, "get_backoff_time", lambda self, settings: 0.05)


def everywhere(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("running", names, indirect=True)


@everywhere(STORES)
def test_a_folder_that_is_not_there_is_empty(place: Folder) -> None:
    assert place.list() == {}
    assert place.list("data/") == {}
    assert place.size("data/x") is None
    assert place.modified("data/x") is None
    place.delete(["data/x", "data/y"])
    with pytest.raises(NotFound):
        place.read("data/x")


@everywhere(STORES)
def test_objects_come_and_go_whole(place: Folder, tmp_path: Path) -> None:
    odd = bytes(range(256)) + b"\r\n\n--==0==\r\n"
    (tmp_path / "file").write_bytes(odd)
    place.put("data/a", b"0123456789")
    place.put("_job/stage/00001/b", tmp_path / "file")
    assert place.list() == {"data/a": 10, "_job/stage/00001/b": len(odd)}
    assert place.list("data/") == {"data/a": 10}
    assert place.list("_job/stage/00001/") == {"_job/stage/00001/b": len(odd)}
    assert place.list("_job/stage/00002/") == {}
    assert place.list("da") == {"data/a": 10}
    assert place.read("data/a") == b"0123456789"
    assert place.read("data/a", 2, 5) == b"234"
    assert place.read("_job/stage/00001/b") == odd
    assert place.size("data/a") == 10
    assert place.exists("data/a")
    assert not place.exists("data")
    assert abs((place.modified("data/a") or 0) - os.stat(tmp_path / "file").st_mtime) < 60
    place.put("data/a", b"anew")
    assert place.read("data/a") == b"anew"
    place.delete(["data/a", "missing"])
    assert place.list() == {"_job/stage/00001/b": len(odd)}


@everywhere(STORES)
def test_put_if_absent_never_replaces(place: Folder, running: Place, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"second")
    assert place.put_if_absent("data/a", b"first")
    assert place.put_if_absent("data/b", tmp_path / "file")
    assert place.read("data/b") == b"second"
    if running.conditional:
        assert not place.put_if_absent("data/a", tmp_path / "file")
        assert place.read("data/a") == b"first"


@everywhere(["gcs"])
def test_a_resumable_upload_is_conditional_too(place: Folder, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(6 << 20))
    assert place.put_if_absent("data/a", path)
    assert not place.put_if_absent("data/a", path)
    assert place.read("data/a") == path.read_bytes()


@everywhere(STORES)
def test_a_probe_tells_whether_conditions_are_honoured_and_leaves_nothing(
    place: Folder, running: Place
) -> None:
    assert place.probe() is running.conditional
    assert place.list() == {}


@everywhere(STORES)
def test_a_folder_crosses_to_another_process(place: Folder) -> None:
    place.put("a", b"1")
    assert pickle.loads(pickle.dumps(place)).read("a") == b"1"


@everywhere(STORES)
def test_threads_race_for_keys_and_one_wins_each(place: Folder, running: Place) -> None:
    place.list()
    wins: list[list[bool]] = []
    start = threading.Barrier(6)

    def race(who: int) -> None:
        start.wait()
        wins.append([place.put_if_absent(f"data/{key}", b"%d" % who * 1000) for key in range(4)])

    threads = [threading.Thread(target=race, args=(who,)) for who in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if running.conditional:
        assert [sum(column) for column in zip(*wins, strict=True)] == [1] * 4
    for key in range(4):  # whoever won, the object is one that somebody gave in full
        assert place.read(f"data/{key}") in [b"%d" % who * 1000 for who in range(6)]


@everywhere(["local", *REMOTE])
def test_a_listing_is_never_a_cached_one(place: Folder) -> None:
    other = Folder(f"{place.url}/", place.storage_options)  # by its URL a client of its own
    place.put("data/a", b"1")
    assert place.list("data/") == {"data/a": 1}
    assert place.size("data/b") is None
    other.put("data/b", b"22")
    other.delete(["data/a"])
    assert place.list("data/") == {"data/b": 2}
    assert place.size("data/a") is None
    assert place.size("data/b") == 2


@everywhere(STORES)
def test_a_whole_run_with_a_zombie_and_a_resumption(place: Folder) -> None:
    rows, plan = [7, 0, 4], layout(3)
    with Lease(place):
        assert pin(place, Identity(plan.plan_hash, JOB_HASH, {}, "model", "0"))
        zombie = attempt(place, plan, 0, 7, "zombie")
        zombie.open()
        zombie.add(answers(0, [6, 2], "zombie"))
        zombie.flush()
        resumed = attempt(place, plan, 0, 7, "resumed")
        resumed.open()
        assert resumed.missing.tolist() == [0, 1, 3, 4, 5]
        resumed.add(answers(0, [0, 1, 3, 4, 5], "resumed"))
        assert resumed.seal(carried(0, 7), SCHEMA).won
        zombie.add(answers(0, [0, 1, 3, 4, 5], "zombie"))
        zombie.flush()
        zombie.seal(carried(0, 7), SCHEMA)
        for partition in (1, 2):
            commit(place, plan, partition, rows[partition], flush_rows=2)
        written = manifest.write(output(place, plan, rows))
    assert written.rows == 11
    assert state.scan(place, plan).complete
    assert set(place.list("_job/")) == {"_job/job.json", "_job/manifest.json"}
    found = verify.verify(output(place, plan, rows), lambda i: carried(i, rows[i]))
    assert found.passed, found.problems
    table = pq.read_table(pa.BufferReader(place.read(plan.part(0))))
    assert table["id"].to_pylist() == [f"0/{row}" for row in range(7)]
    place.put("data/theirs", b"x")
    clean.delete(place, clean.owned(output(place, plan)))
    assert place.list() == {"data/theirs": 1}


@everywhere(REMOTE)
def test_a_bucket_that_is_not_there_is_refused(running: Place) -> None:
    url = f"{running.url.partition('://')[0]}://no-such-bucket-here/out"
    with pytest.raises(OutputError, match="no such bucket"):
        Folder(url, running.options).probe()


@everywhere(REMOTE)
@pytest.mark.usefixtures("_hasty_libraries")
def test_a_lost_acknowledgement_is_success(far: Folder, between: Wire) -> None:
    far.list()
    between.lose = 1
    receipt = commit(far, layout(1), 0, 3)
    assert between.lost == 1
    assert receipt.won
    table = pq.read_table(pa.BufferReader(far.read(receipt.key)))
    assert table["id"].to_pylist() == ["0/0", "0/1", "0/2"]


def refusal(place: Place, status: int, code: str) -> bytes:
    """An error in the words of the store."""
    if place.url.startswith("gs:"):
        return answer(status, json.dumps({"error": {"message": code}}), "application/json")
    return answer(status, f"<Error><Code>{code}</Code><Message>said</Message></Error>")


@everywhere(REMOTE)
@pytest.mark.usefixtures("_hasty_libraries")
def test_a_store_that_throttles_is_waited_for(far: Folder, between: Wire, running: Place) -> None:
    far.list()
    between.answers = [refusal(running, 503, "SlowDown")] * 3
    far.put("data/a", b"1")
    assert not between.answers
    assert far.read("data/a") == b"1"


@everywhere(REMOTE)
@pytest.mark.usefixtures("_hasty_libraries")
def test_expired_credentials_build_a_new_client(far: Folder, between: Wire, running: Place) -> None:
    far.put("data/a", b"1")
    before = folder._store(far.url, far.storage_options)
    between.answers = [refusal(running, 403, "InvalidAccessKeyId")]
    assert far.read("data/a") == b"1"
    assert folder._store(far.url, far.storage_options) is not before
    assert not between.answers
