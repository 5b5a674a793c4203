"""Input files are pinned by their footers: one replaced under the same name, size and time is another file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import batches_of, plan_of, rows_of, write

from batchrun.dataset.location import read_footer
from batchrun.dataset.plan import Plan, difference, joined
from batchrun.driver import prepare as preparing
from batchrun.driver.prepare import compare
from batchrun.errors import ChangedError, InputError
from batchrun.job.settings import InputSettings
from batchrun.output import identity, plans
from batchrun.storage import Folder
from jobs import load, write_job


def replaced(path: Path) -> None:
    """Another file of the same name, size and modification time: one letter of a statistic differs."""
    before = path.stat()
    data = path.read_bytes()
    table = pq.read_table(path)
    other = pa.table({"text": [text.swapcase() for text in table["text"].to_pylist()]})
    pq.write_table(other, path, row_group_size=2)
    assert path.stat().st_size == before.st_size
    assert path.read_bytes() != data
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "in.parquet", {"text": list("abcdef")}, groups=2)


def test_a_file_replaced_by_one_of_equal_size_and_time_is_another_plan_and_named(path: Path) -> None:
    settings = InputSettings(path=str(path))
    before = plan_of(settings)
    replaced(path)
    after = plan_of(settings)
    file = before.files[0]
    assert (file.size, file.version) == (after.files[0].size, after.files[0].version)
    assert before.hash != after.hash
    assert difference(before, after) == [
        f"changed: {path} (same size and time, another footer: it was replaced)"
    ]


def test_a_file_replaced_after_it_was_planned_is_refused_when_it_is_read(path: Path) -> None:
    settings = InputSettings(path=str(path))
    plan = plan_of(settings)
    replaced(path)
    with pytest.raises(ChangedError, match="same size and time, another footer"):
        batches_of(plan, settings, plan.partitions[0])


def test_footers_stand_in_the_stored_plan_and_large_ones_are_read_whole(tmp_path: Path) -> None:
    columns = {f"a column with a long name {i} " + "x" * 200: [1] for i in range(400)}
    path = write(tmp_path / "in.parquet", columns)
    plan = plan_of(InputSettings(path=str(path)))
    again = Plan.from_parquet(plan.to_parquet())
    assert again.files == plan.files
    assert len(plan.files[0].footer) == 64
    footer = read_footer(str(path), path.stat().st_size, {})
    assert footer.metadata.serialized_size > 64 << 10
    assert (footer.metadata, footer.schema) == (pq.read_metadata(path), pq.read_schema(path))


def as_earlier_versions_wrote(plan: Plan) -> bytes:
    """A plan's bytes without the column of footers."""
    data = pq.read_table(pa.BufferReader(plan.without_footers().to_parquet()))
    sink = pa.BufferOutputStream()
    pq.write_table(data.drop_columns(["footer"]), sink)
    return sink.getvalue().to_pybytes()


def test_a_plan_without_footers_stays_readable_under_its_own_hash(path: Path) -> None:
    settings = InputSettings(path=str(path))
    plan = plan_of(settings)
    earlier = Plan.from_parquet(as_earlier_versions_wrote(plan))
    assert earlier.files == [replace(plan.files[0], footer="")]
    assert earlier.hash == plan.without_footers().hash != plan.hash
    assert rows_of(earlier, settings)["text"].to_pylist() == list("abcdef")
    mixed = joined([earlier, plan])
    assert [bool(file.footer) for file in mixed.files] == [False, True]


def test_an_output_begun_without_footers_goes_on_under_its_own_plan(tmp_path: Path, tiny_llama: Path) -> None:
    job = load(write_job(tmp_path, tiny_llama))
    fresh = preparing.prepare(job)
    folder = Folder(job.output.path)
    earlier = Plan.from_parquet(as_earlier_versions_wrote(fresh.plan))
    plans.add(folder, [earlier], 0)
    pinned = identity.Identity(
        earlier.hash, fresh.identity.job_hash, fresh.identity.settings, fresh.model.fingerprint, "0"
    )
    identity.pin(folder, pinned)
    again = preparing.prepare(job)
    assert again.plan.hash == earlier.hash != fresh.plan.hash
    assert again.layout.part(0).endswith(f"{earlier.hash[:8]}.parquet")
    compare(again, again.pinned)
    os.utime(tmp_path / "in.parquet", (1, 1))
    with pytest.raises(ChangedError, match=r"changed: .*in\.parquet"):
        compare(preparing.prepare(job), pinned)


def test_a_file_cut_short_is_named_when_planning(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        plan_of(InputSettings(path=str(path)))
