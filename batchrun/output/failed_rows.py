"""The failed rows of an output as a small dataset of its own: carried columns, error, and the place in the input; of
samples in rows of their own, also the sample.

Every part with failed rows has a file of its own name in the folder `output.failed`. It is told from the part's bytes
alone and names the attempt that made those, so that it can be written by anybody, at any time, and again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchrun.dataset.rows import PLACE, Places
from batchrun.errors import BatchrunError, OutputError
from batchrun.job.output import SAMPLE, OutputSettings
from batchrun.output import part
from batchrun.output.layout import Layout
from batchrun.output.part import Summary
from batchrun.output.samples import repeated_batches
from batchrun.storage import Folder, NotFound

# Whole parts are held while they are read, so few at a time.
READERS = 4


def refuse_taken(carried: Sequence[str], settings: OutputSettings) -> None:
    """Raises OutputError where a column that is carried along has one of the place's names."""
    own = [settings.column("error"), *([settings.column(SAMPLE)] if settings.rows_of_row > 1 else [])]
    if settings.failed is not None and (taken := [name for name in PLACE.names if name in (*carried, *own)]):
        raise OutputError(
            f"the name {taken[0]!r} of a column in {settings.failed}/ is taken",
            "output.failed",
            "leave that column out of input.columns, or do without output.failed",
        )


class FailedRows:
    """The dataset of failed rows beside an output's parts, where its `settings` want one."""

    def __init__(self, folder: Folder, layout: Layout, settings: OutputSettings) -> None:
        self._folder, self._layout, self._settings = folder, layout, settings

    def update(self, partition: int, places: Places) -> None:
        """Makes the partition's file agree with its part: one put, or a delete where none failed."""
        key = self._key(partition)
        table, summary = self._of_part(partition, places)
        if table.num_rows == 0:
            self._folder.delete([key])
            return
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(
            sink, table.schema, compression=self._settings.compression, write_page_checksum=True
        ) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({"batchrun": json.dumps({"attempt": summary.attempt})})
        self._folder.put(key, sink.getvalue().to_pybytes())

    def complete(self, summaries: Sequence[Summary], places: Places) -> None:
        """Writes what is missing or of a part's earlier bytes, and deletes what no part has failed rows for."""
        there = self._there()
        wanted = {self._key(i): i for i, summary in enumerate(summaries) if summary.failed}

        def bring_up(key: str) -> None:
            i = wanted[key]
            if key not in there or _attempt_of(self._folder, key) != summaries[i].attempt:
                self.update(i, places)

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(bring_up, wanted))
        failed = self._settings.failed or ""
        mine = (key for key in there if partition_of(key, failed, self._layout) is not None)
        self._folder.delete([key for key in mine if key not in wanted])

    def problems(self, failed: Sequence[int], places: Places | None) -> Iterator[str]:
        """What is wrong with it, given how many rows of each partition `failed`; every value is compared."""
        there = self._there()
        wanted = {self._key(i): i for i, rows in enumerate(failed) if rows}
        yield from (
            f"{key}: no part of this output has these failed rows" for key in there if key not in wanted
        )
        for key, i in wanted.items():
            if key not in there:
                yield f"{key}: missing"
                continue
            try:
                found = pq.read_table(
                    pa.BufferReader(self._folder.read(key)), page_checksum_verification=True
                )
                expected, _ = self._of_part(i, places)
            except (BatchrunError, pa.ArrowException, OSError, ValueError, KeyError) as error:
                yield f"{key}: {error}"
                continue
            names = [name for name in expected.column_names if places or name not in PLACE.names]
            # Arrow holds NaN unequal to itself; as text it is not.
            if [*found.column_names] != expected.column_names or repr(
                found.select(names).to_pylist()
            ) != repr(expected.select(names).to_pylist()):
                yield f"{key}: other rows than the part's failed ones"

    def _of_part(self, partition: int, places: Places | None) -> tuple[pa.Table, Summary]:
        """The part's failed rows with their places, and the footer of the very bytes they were read from."""
        folder, settings, key = self._folder, self._settings, self._layout.part(partition)
        file = pq.ParquetFile(pa.BufferReader(folder.read(key)), page_checksum_verification=True)
        rows = file.read()
        own = {settings.column(name) for name in settings.answer_columns if name != SAMPLE}
        names = [name for name in rows.column_names if name not in own] + [settings.column("error")]
        failed = pc.equal(rows[settings.column("status")], "failed")
        empty = pa.table({field.name: pa.nulls(rows.num_rows, field.type) for field in PLACE})
        some = places is not None and pc.any(failed, min_count=0).as_py()
        place = empty
        if some and places is not None:
            repeated = repeated_batches(places(partition), settings.rows_of_row)
            place = pa.Table.from_batches(repeated, PLACE)
        if place.num_rows != rows.num_rows:
            raise part.damaged(folder, key, f"{rows.num_rows} rows where the input gives {place.num_rows}")
        table = pa.table(
            [rows[name] for name in names] + place.columns,
            schema=pa.schema([*(rows.schema.field(name) for name in names), *PLACE]),
        )
        return table.filter(failed), part.read_summary(file.metadata, folder, key)

    def _there(self) -> dict[str, int]:
        return self._folder.list(f"{self._settings.failed}/")

    def _key(self, partition: int) -> str:
        return f"{self._settings.failed}/{self._layout.part(partition).rpartition('/')[2]}"


def partition_of(key: str, failed: str, layout: Layout) -> int | None:
    """Which partition's failed rows the key in the folder `failed` is; None where it is no such file."""
    name = key.removeprefix(f"{failed}/")
    return None if name == key else layout.partition_named(name)


def _attempt_of(folder: Folder, key: str) -> str:
    """Of which attempt's part the file was told; empty where it does not say."""
    try:
        metadata = pq.read_metadata(pa.BufferReader(folder.read(key))).metadata
        return str(json.loads(metadata[b"batchrun"])["attempt"])
    except (NotFound, pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return ""
