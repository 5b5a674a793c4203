"""Every byte of every part is under a digest: `verify` and `retry` refuse whatever changed since it was written."""

from __future__ import annotations

import hashlib
import random
from dataclasses import asdict, replace

import pytest
from parts import JOB_HASH, SCHEMA, answers, attempt, carried, commit, faulty_folder, layout, output
from parts import settings as output_settings
from test_replace import JOB as PINNED

from batchrun.commands.verify import Checked
from batchrun.errors import OutputError
from batchrun.output import digest, document, manifest, part, verify
from batchrun.output.layout import MANIFEST
from batchrun.output.replace import ReplacingAttempt
from batchrun.output.retry import Retry
from batchrun.storage import Folder

ROWS = [3, 40]
PLAN = layout(len(ROWS))


@pytest.fixture
def place() -> Folder:
    """A folder with a complete output of two parts."""
    folder, _ = faulty_folder()
    for partition, rows in enumerate(ROWS):
        commit(folder, PLAN, partition, rows)
    manifest.write(output(folder, PLAN, ROWS))
    return folder


def check(folder: Folder) -> verify.Verification:
    return verify.verify(output(folder, PLAN, ROWS), lambda i: carried(i, ROWS[i]))


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_flipped_bit_anywhere_in_a_part_is_refused_by_verify(place: Folder) -> None:
    key = PLAN.part(1)
    whole = place.read(key)
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    rng = random.Random(4)
    bits = rng.sample(range(footer * 8), 60) + rng.sample(range(footer * 8, len(whole) * 8), 240)
    assert check(place).passed
    for bit in bits:
        place.put(key, flipped(whole, bit))
        found = check(place)
        assert any(problem.startswith(key) for problem in found.problems), (bit, footer)


def test_a_part_carries_the_digest_of_all_its_bytes(place: Folder) -> None:
    for partition in range(len(ROWS)):
        data = place.read(PLAN.part(partition))
        own = part.inspect(place, PLAN.part(partition)).digest
        assert hashlib.sha256(data.replace(own.encode(), digest.BLANK.encode())).hexdigest() == own


def test_receipt_and_manifest_have_the_digest_of_the_part() -> None:
    folder, _ = faulty_folder()
    receipts = [commit(folder, PLAN, partition, rows) for partition, rows in enumerate(ROWS)]
    written = manifest.write(output(folder, PLAN, ROWS), dict(enumerate(receipts)))
    assert [one.summary.digest for one in receipts] == [entry.digest for entry in written.parts]
    for entry in written.parts:
        assert digest.matches(folder.read(entry.key), entry.digest)
    assert manifest.write(output(folder, PLAN, ROWS)) == written, "told from the parts alone, it is the same"


def test_a_whole_part_in_place_of_the_manifests_is_refused(place: Folder) -> None:
    key = PLAN.part(0)
    own = part.inspect(place, key)
    other, _ = faulty_folder()
    one = attempt(other, PLAN, 0, ROWS[0], own.attempt)
    one.open()
    changed = answers(0, range(ROWS[0]), "b")
    one.add(changed)
    one.seal(carried(0, ROWS[0]), SCHEMA)
    data = other.read(key)
    assert len(data) == place.size(key)
    place.put(key, data)
    assert check(place).problems == [f"{key}: its digest is not the manifest's"]


def retrying(folder: Folder) -> ReplacingAttempt:
    identity = replace(PINNED, job_hash=JOB_HASH, plan_hash=PLAN.plan_hash)
    return ReplacingAttempt(
        folder, PLAN, 0, 3, "retry", output_settings(), Retry(1, [], len(ROWS), [], identity)
    )


def test_a_retry_never_takes_rows_from_a_damaged_part_and_gives_its_own_a_digest() -> None:
    folder, _ = faulty_folder()
    one = attempt(folder, PLAN, 0, 3, "a")
    one.open()
    one.add(answers(0, range(3), "a", failed=[1]))
    one.seal(carried(0, 3), SCHEMA)
    key = PLAN.part(0)
    whole = folder.read(key)
    # A count in the footer, which no checksum of a page covers.
    folder.put(key, whole.replace(b'"output_tokens": 4', b'"output_tokens": 5'))
    with pytest.raises(OutputError, match="its bytes changed since it was written"):
        retrying(folder).open()
    folder.put(key, whole)
    again = retrying(folder)
    assert again.open() is None
    again.add(answers(0, again.missing, "b"))
    receipt = again.seal(iter(again.carried.to_batches()), SCHEMA)
    assert digest.matches(folder.read(key), receipt.summary.digest)


def without_digests(folder: Folder) -> None:
    """Makes the output what versions without digests wrote."""
    for partition in range(len(ROWS)):
        key = PLAN.part(partition)
        data = folder.read(key)
        own = part.inspect(folder, key).digest
        # The same length, so that the footer stays one: an unknown key instead.
        folder.put(key, data.replace(b'"digest": "' + own.encode(), b'"earlier": "' + b"0" * 63))
    written = asdict(manifest.read(folder))  # type: ignore[call-overload]
    for entry in written["parts"]:
        del entry["digest"]
    folder.put(MANIFEST, document.encode(written))


def test_one_part_is_not_called_parts():
    lines = Checked("out", verify.Verification(1, 1, 1, 0, without_digest=1)).lines()
    assert lines[0].startswith("verified: 1 row = 1 ok + 0 failed, in 1 part;")
    assert lines[1].startswith("note: 1 part of an earlier version")


def test_outputs_without_digests_stay_readable_and_verify_says_so(place: Folder) -> None:
    without_digests(place)
    found = check(place)
    assert found.passed, found.problems
    assert found.without_digest == 2
    lines = Checked("out", found).lines()
    assert "2 parts of an earlier version, without a digest" in lines[1]
    before = place.read(MANIFEST)
    assert manifest.write(output(place, PLAN, ROWS)).ok == sum(ROWS)
    assert place.read(MANIFEST) == before, "a run after success writes nothing"


def test_a_new_part_whose_digest_is_gone_is_no_earlier_versions(place: Folder) -> None:
    written = place.read(MANIFEST)
    without_digests(place)
    place.put(MANIFEST, written)
    assert [p.rpartition(": ")[2] for p in check(place).problems] == ["its digest is not the manifest's"] * 2
