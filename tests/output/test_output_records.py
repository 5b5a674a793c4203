"""What stands beside the parts: identity, state, lease, manifest; and verification and cleaning."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import (
    answers,
    attempt,
    carried,
    commit,
    faulty_folder,
    layout,
    other_holder,
    output,
    pin,
    store_of,
)

from batchrun.errors import BatchrunError, ChangedError, Incomplete, LeaseHeld, OutputError
from batchrun.output import clean, document, identity, lease, manifest, state, verify
from batchrun.output.document import Damaged
from batchrun.output.identity import Identity
from batchrun.output.layout import JOB, LEASE, MANIFEST
from batchrun.output.lease import Holder, Lease
from batchrun.storage import Folder, folder

ROWS = [3, 5, 0]
PLAN = layout(3)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FIRST_WAIT", 0)
    monkeypatch.setattr(lease, "SETTLE", 0.05)


@pytest.fixture
def place() -> Folder:
    return faulty_folder()[0]


def complete(place: Folder) -> manifest.Manifest:
    for partition, rows in enumerate(ROWS):
        commit(place, PLAN, partition, rows)
    return manifest.write(output(place, PLAN, ROWS))


# Documents


@settings(max_examples=300)
@given(st.integers(0, 2**32))
def test_a_damaged_document_is_never_read(seed: int) -> None:
    rng = random.Random(seed)
    whole = document.encode({"a": {"b": [1, 2.5, None]}, "text": "häß"})
    at = rng.randrange(len(whole))
    bad = whole[:at] if rng.random() < 0.3 else whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :]
    try:
        values = document.decode(bad)
    except Damaged:
        return
    assert values == document.decode(whole)


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"{}", b'{"sha256": 1}', b"[" * 100_000, b"\xff", b"<html>"]
)
def test_anything_else_is_no_document(data: bytes) -> None:
    with pytest.raises(Damaged):
        document.decode(data)


@pytest.mark.parametrize(("key", "read"), [(JOB, identity.read), (MANIFEST, manifest.read)])
def test_damaged_records_are_typed_errors_that_say_where(place: Folder, key: str, read: object) -> None:
    assert read(place) is None  # type: ignore[operator]
    for data in (b"{", document.encode({"format": identity.FORMAT, "parts": [{}]})):
        place.put(key, data)
        with pytest.raises(OutputError, match=f"{key}: damaged"):
            read(place)  # type: ignore[operator]


# Identity

IDENTITY = Identity(
    plan_hash="p" * 64,
    job_hash="j" * 64,
    settings={"generation": {"temperature": 0.0, "stop": []}, "prompt": {"template": "{{ a }}"}},
    model_fingerprint="m" * 64,
    batchrun_version="0.1.0",
)


def test_the_first_run_pins_and_the_same_job_goes_on(place: Folder) -> None:
    assert pin(place, IDENTITY)
    assert not pin(place, replace(IDENTITY, created="later", batchrun_version="0.2.0"))
    assert store_of(place).counts()["create"] == 1
    assert identity.read(place) == IDENTITY


def test_a_lost_acknowledgement_of_the_pin_is_success(place: Folder) -> None:
    store_of(place).script("create", JOB, "lost")
    pin(place, IDENTITY)
    assert identity.read(place) == IDENTITY


def test_changed_settings_are_refused_with_each_difference(place: Folder) -> None:
    pin(place, IDENTITY)
    other = {"generation": {"temperature": 0.7, "stop": ["\n"]}, "prompt": {"column": "a"}}
    changed = replace(IDENTITY, settings=other, job_hash="k" * 64)
    with pytest.raises(ChangedError) as caught:
        pin(place, changed)
    text = str(caught.value)
    assert "generation.temperature: 0.0 -> 0.7" in text
    assert 'generation.stop: [] -> ["\\n"]' in text
    assert "prompt.template: {{ a }} -> null" in text
    assert "prompt.column: null -> a" in text
    assert "another output.path" in text
    assert "clean --all" in text


def test_a_changed_model_is_refused(place: Folder) -> None:
    pin(place, IDENTITY)
    with pytest.raises(ChangedError, match=r"model: mmm.* -> nnn"):
        pin(place, replace(IDENTITY, model_fingerprint="n" * 64, job_hash="k" * 64))
    with pytest.raises(ChangedError, match=r"job: jjj.* -> kkk"):
        pin(place, replace(IDENTITY, job_hash="k" * 64))


def test_changed_inputs_are_refused_with_the_lines_of_the_caller(place: Folder) -> None:
    pin(place, IDENTITY)
    changed = replace(IDENTITY, plan_hash="q" * 64)
    with pytest.raises(ChangedError, match=r"a.parquet: 3 rows -> 4 rows; b.parquet: added"):
        pin(place, changed, lambda: ["a.parquet: 3 rows -> 4 rows", "b.parquet: added"])
    with pytest.raises(ChangedError, match=r"inputs: ppp.* -> qqq"):
        pin(place, changed)


def test_another_format_is_refused_by_its_version(place: Folder) -> None:
    place.put(JOB, document.encode({**asdict(IDENTITY), "format": 99, "batchrun_version": "9.0", "more": 1}))
    with pytest.raises(ChangedError, match=r"written by batchrun 9.0 in format 99; run batchrun 9.0"):
        pin(place, IDENTITY)


def test_two_drivers_that_pin_at_once_agree_or_one_is_refused(place: Folder) -> None:
    outcomes: list[object] = []

    def run(one: Identity) -> None:
        try:
            outcomes.append(pin(place, one))
        except ChangedError as error:
            outcomes.append(error)

    others = [IDENTITY, replace(IDENTITY, plan_hash="q" * 64)]
    threads = [threading.Thread(target=run, args=(one,)) for one in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["ChangedError", "bool"]


# State


def test_one_listing_tells_how_far_a_plan_has_come(place: Folder) -> None:
    commit(place, PLAN, 1, 5)
    one = attempt(place, PLAN, 0, 3, "me")
    one.open()
    one.add(answers(0, [1]))
    one.flush()
    place.put("data/notes.txt", b"x")
    store_of(place).requests.clear()
    found = state.scan(place, PLAN)
    assert store_of(place).counts() == {"find": 1}
    assert found.committed.tolist() == [False, True, False]
    assert found.streaming.tolist() == [True, False, False]
    assert found.planned.tolist() == [False, False, True]
    assert found.staged_bytes[0] > 0
    assert not found.complete
    with pytest.raises(OutputError, match=r"data/ holds what is not of this job: data/notes.txt"):
        found.refuse_foreign(place)


def test_a_hundred_thousand_partitions_are_scanned_in_seconds(place: Folder) -> None:
    plan = layout(100_000)
    root = place.url.removeprefix("faulty://")
    store_of(place).objects = {f"{root}/{plan.part(i)}": b"x" for i in range(100_000)}
    start = time.process_time()
    assert state.scan(place, plan).complete
    assert time.process_time() - start < 5


# Manifest


def test_the_manifest_counts_what_the_parts_say(place: Folder) -> None:
    one = attempt(place, PLAN, 0, 3, "me")
    one.open()
    one.add(answers(0, range(3), failed=[1]))
    one.seal(carried(0, 3), pa.schema([pa.field("id", pa.string()), pa.field("n", pa.int64())]))
    written = complete(place)
    assert (written.rows, written.ok, written.failed, written.output_tokens) == (8, 7, 1, 14)
    assert written.errors == {"PROMPT_TOO_LONG": 1}
    assert [entry.rows for entry in written.parts] == ROWS
    assert manifest.read(place) == written
    assert written.describes(state.scan(place, PLAN))


def test_a_second_manifest_writes_nothing(place: Folder) -> None:
    complete(place)
    store_of(place).requests.clear()
    complete(place)
    assert set(store_of(place).counts()) <= {"find", "info", "read"}


def test_no_manifest_without_every_part(place: Folder) -> None:
    commit(place, PLAN, 0, 3)
    with pytest.raises(Incomplete, match="2 of 3 parts are missing, the first is data/part-00001"):
        manifest.write(output(place, PLAN, ROWS))
    assert manifest.read(place) is None


def test_no_manifest_over_parts_of_another_length_or_job(place: Folder) -> None:
    complete(place)
    with pytest.raises(OutputError, match="5 rows where the plan has 6"):
        manifest.write(output(place, PLAN, [3, 6, 0]))
    with pytest.raises(OutputError, match="another job"):
        manifest.write(output(place, PLAN, ROWS, "other"))


# Verification


def check(place: Folder, **kw: object) -> verify.Verification:
    return verify.verify(output(place, PLAN, ROWS), **kw)  # type: ignore[arg-type]


def test_a_finished_output_verifies(place: Folder) -> None:
    complete(place)
    found = check(place, carried=lambda partition: carried(partition, ROWS[partition], 3))
    assert found.passed, found.problems
    assert (found.parts, found.rows, found.ok, found.failed) == (3, 8, 8, 0)


def test_nan_is_no_difference(place: Folder) -> None:
    table = pa.table({"x": [float("nan"), 1.0, None]})
    one = attempt(place, layout(1), 0, 3, "me")
    one.open()
    one.add(answers(0, range(3)))
    one.seal(table.to_batches(), table.schema)
    manifest.write(output(place, layout(1), [3]))
    one_by_one = table.to_batches(max_chunksize=1)
    found = verify.verify(output(place, layout(1), [3]), carried=lambda _: one_by_one)
    assert found.passed, found.problems


def rewritten(place: Folder, key: str, change: object) -> None:
    """The same part with other rows, under the metadata that it had."""
    data = place.read(key)
    metadata = pq.read_metadata(pa.BufferReader(data)).metadata[b"batchrun"]
    sink = pa.BufferOutputStream()
    table = change(pq.read_table(pa.BufferReader(data)))  # type: ignore[operator]
    with pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"batchrun": metadata.decode()})
    place.put(key, sink.getvalue().to_pybytes())


def swap(table: pa.Table) -> pa.Table:
    return table.take([1, 0, *range(2, table.num_rows)])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda place: place.delete([PLAN.part(1)]), "part-00001.*missing"),
        (lambda place: place.put("data/part-00009-abcdef01.parquet", b"x"), "not a part of this plan"),
        (lambda place: place.put(PLAN.part(1), b"PAR1 no"), "not a whole part"),
        (lambda place: place.put(PLAN.part(1), place.read(PLAN.part(0))), "another job, plan or partition"),
        (
            lambda place: rewritten(place, PLAN.part(1), lambda t: t.slice(1)),
            "4 rows where its own count says 5",
        ),
        (
            lambda place: rewritten(place, PLAN.part(1), swap),
            "column id differs from the input in rows 0 to 4",
        ),
        (lambda place: place.delete([MANIFEST]), "no manifest"),
        (lambda place: place.put(MANIFEST, b"{"), "damaged"),
    ],
)
def test_whatever_is_wrong_is_named(place: Folder, damage: object, problem: str) -> None:
    complete(place)
    damage(place)  # type: ignore[operator]
    found = check(place, carried=lambda partition: carried(partition, ROWS[partition]))
    assert not found.passed
    assert re.search(problem, "\n".join(found.problems)), found.problems


def test_a_flipped_bit_in_a_page_is_found(place: Folder) -> None:
    complete(place)
    key = PLAN.part(1)
    data = place.read(key)
    at = data.index(b"1/3 by a") + 2
    place.put(key, data[:at] + b"4" + data[at + 1 :])
    assert "part-00001" in "\n".join(check(place).problems)


# Cleaning


def test_cleaning_sweeps_what_is_committed_and_nothing_else(place: Folder) -> None:
    for partition in (0, 1):
        zombie = attempt(place, PLAN, partition, ROWS[partition], "zombie")
        zombie.open()
        zombie.add(answers(partition, [1]))
        if partition == 0:
            commit(place, PLAN, 0, 3)
        zombie.flush()
    place.put("data/foreign", b"x")
    place.put("_job/tmp/young", b"x")
    for key in ("_job/tmp/old", "_job/probe-of-a-killed-driver"):
        place.put(key, b"x")
        store_of(place).written[f"{place.url.removeprefix('faulty://')}/{key}"] -= 7200
    swept = ["_job/probe-of-a-killed-driver", "_job/stage/00000-abcdef01/1-zombie-1.chunk", "_job/tmp/old"]
    assert clean.leftovers(output(place, PLAN)) == swept
    clean.delete(place, swept)
    kept = {"_job/stage/00001-abcdef01/1-zombie-1.chunk", "_job/tmp/young", "data/foreign", PLAN.part(0)}
    assert set(place.list()) == kept


def test_cleaning_everything_leaves_what_is_not_ours(place: Folder) -> None:
    complete(place)
    pin(place, IDENTITY)
    place.put("data/part-0.parquet", b"theirs")
    place.put("notes.txt", b"theirs")
    clean.delete(place, clean.owned(output(place, PLAN)))
    assert set(place.list()) == {"data/part-0.parquet", "notes.txt"}


# Lease


def put_holder(place: Folder, holder: Holder) -> None:
    place.put(LEASE, document.encode(asdict(holder)))


def age_lease(place: Folder, seconds: float) -> None:
    store_of(place).written[f"{place.url.removeprefix('faulty://')}/{LEASE}"] -= seconds


def test_a_lease_is_given_back(place: Folder) -> None:
    with Lease(place):
        assert lease.read(place) is not None
    assert lease.read(place) is None
    assert place.list() == {}


def test_the_same_job_started_twice_says_so(place: Folder) -> None:
    with (
        Lease(place),
        pytest.raises(LeaseHeld, match=rf"process {os.getpid()} on .* since 20.*; .*--force"),
        Lease(place),
    ):
        pass
    assert lease.read(place) is None


def test_a_forced_driver_takes_over_and_the_first_one_notices(
    place: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 0.02)
    with Lease(place) as first:
        first.check()
        with Lease(place, force=True):
            deadline = time.monotonic() + 10
            while first.taken_by is None and time.monotonic() < deadline:
                time.sleep(0.01)
            with pytest.raises(LeaseHeld, match=rf"process {os.getpid()} on .* took it over"):
                first.check()
            assert lease.read(place) is not None
        assert lease.read(place) is None


def test_a_lease_that_nobody_holds_any_more_is_held_again(
    place: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 0.02)
    with Lease(place) as first:
        mine = lease.read(place)
        place.delete([LEASE])
        deadline = time.monotonic() + 10
        while lease.read(place) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        first.check()
        now = lease.read(place)
        assert mine is not None
        assert now is not None
        assert now.driver == mine.driver


def test_the_heartbeat_keeps_a_lease_alive(place: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 0.02)
    with Lease(place):
        first = lease.read(place)
        deadline = time.monotonic() + 10
        while lease.read(place) == first and time.monotonic() < deadline:
            time.sleep(0.01)
        later = lease.read(place)
        assert first is not None
        assert later is not None
        assert later.heartbeat > first.heartbeat
        assert later.since == first.since


def test_a_busy_store_does_not_end_a_lease(place: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 0.02)
    with Lease(place) as held:
        store_of(place).script("put", LEASE, "full", "full", "full")
        deadline = time.monotonic() + 10
        while store_of(place).scripted and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not store_of(place).scripted
        held.check()
        assert held._thread is not None
        assert held._thread.is_alive()


def test_a_lease_without_a_heartbeat_expires_by_the_clock_of_the_store(place: Folder) -> None:
    # The other driver's clock runs an hour ahead: only the store's own tells that it is silent.
    put_holder(place, other_holder(heartbeat=time.time() + 3600))
    with pytest.raises(LeaseHeld, match="process 1 on far"), Lease(place):
        pass
    age_lease(place, 61)
    with Lease(place):
        assert lease.read(place) is not None
    assert place.list() == {}


def test_a_live_driver_with_a_slow_clock_is_left_alone(place: Folder) -> None:
    put_holder(place, other_holder(heartbeat=time.time() - 3600))
    with pytest.raises(LeaseHeld), Lease(place):
        pass


def test_a_dead_driver_on_this_machine_is_followed_at_once(place: Folder) -> None:
    code = "import sys; sys.path[:0] = sys.argv[1:]\nfrom batchrun.output.lease import _this_process as t\n"
    code += "import json, dataclasses; print(json.dumps(dataclasses.asdict(t())))"
    paths = [str(Path(lease.__file__).parents[2])]
    ran = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True, timeout=60
    )
    dead = Holder(**json.loads(ran.stdout))
    assert dead.is_dead()
    put_holder(place, dead)
    with Lease(place):
        pass


def test_a_pid_used_again_is_not_the_driver(place: Folder) -> None:
    me = lease._this_process()
    assert not me.is_dead()
    assert replace(me, started="1").is_dead()
    assert not replace(me, machine="elsewhere", started="1").is_dead()


@pytest.mark.parametrize("data", [b"", b"{}", b"null", document.encode({"driver": "x"})])
def test_a_damaged_lease_is_nobodys(place: Folder, data: bytes) -> None:
    place.put(LEASE, data)
    with Lease(place):
        assert lease.read(place) is not None


def test_of_many_drivers_at_once_one_gets_the_lease(place: Folder) -> None:
    put_holder(place, other_holder())
    age_lease(place, 100)
    held: list[Lease] = []
    refused: list[BatchrunError] = []
    start = threading.Barrier(4)

    def run() -> None:
        one = Lease(place)
        start.wait()
        try:
            held.append(one.__enter__())
        except LeaseHeld as error:
            refused.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    assert len(refused) == 3
    held[0].__exit__(None, None, None)


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "batchrun-lease"]
