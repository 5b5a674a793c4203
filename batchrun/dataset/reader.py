"""A partition to record batches, exactly the rows that were planned."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchrun.dataset.filters import Filters, filter_columns, parse_filters
from batchrun.dataset.hive import constants
from batchrun.dataset.location import open_parquet, read_footer, stat
from batchrun.dataset.plan import Slice
from batchrun.dataset.rowgroup import READING, read_group
from batchrun.dataset.source import DataFile
from batchrun.errors import ChangedError, CorruptInput, FaultCode, RowFault


class RowBatch(NamedTuple):
    """Consecutive rows of a partition.

    `first` is the place of its first row among the partition's rows, `records` the rows, and `row_ids`
    (rows,) uint64 a stable number of each: it depends on the row's file, row group and place there alone, not
    on how the dataset is cut. `file`, `row_group` and `places` (rows,) int64 are these. With a `fault` the rows
    could not be read, and every value in `records` is null.
    """

    first: int
    records: pa.RecordBatch
    row_ids: NDArray[np.uint64]
    file: str
    row_group: int
    places: NDArray[np.int64]
    fault: RowFault | None = None


def read_partition(
    slices: Sequence[Slice],
    files: Mapping[int, DataFile],
    schema: pa.Schema,
    columns: Sequence[str],
    filters: list[Any] | None,
    cast: Container[str],
    storage_options: Mapping[str, Any],
    batch_rows: int = 1024,
    salvage: bool = False,
) -> Iterator[RowBatch]:
    """The rows of a partition's slices, in order, `batch_rows` or fewer at a time, with `columns` as `schema`
    has them.

    `files`, `schema` are the plan's (`plan.files_of(partition)`, `plan.schema`); `filters`, `cast` and
    `storage_options` the job's. Memory stays flat however large a row group is. With `salvage`, the rows of a
    slice from its first undecodable page on come as batches of nulls with a fault, and the slices after it
    are read.

    Raises:
        ChangedError: a file is gone or another than was planned, or gives another number of rows.
        CorruptInput: a page cannot be decoded; not with `salvage`.
        InputError: a value that cannot be cast as the job asks.
    """
    tested = parse_filters(filters, schema)
    wanted = dict.fromkeys([*columns, *filter_columns(filters)])
    # Rows of no columns at all could not be counted.
    read = pa.schema([schema.field(name) for name in wanted or schema.names[:1]])
    reader = _Reader(read, list(columns), tested, cast, batch_rows, salvage)
    first = 0
    for number, own in groupby(slices, key=lambda part: part.file):
        file = files[number]
        metadata = _check_unchanged(file, storage_options)
        with open_parquet(file.path, storage_options, metadata=metadata, **READING) as parquet:
            for part in own:
                _check_rows(parquet, file, part)
                for batch in reader.read(parquet, file, part):
                    yield batch._replace(first=first + batch.first)
                first += part.rows


def row_ids(path: str, row_group: int, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(rows,) A 64-bit number for each place in a row group: a hash of path and group, mixed with the row's
    number by the finalizer of splitmix64 (Steele, Lea, Flood 2014: Fast Splittable Pseudorandom Number
    Generators)."""
    start = hashlib.blake2b(f"{path}\n{row_group}".encode(), digest_size=8).digest()
    z = np.uint64(int.from_bytes(start, "little")) + (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class _Reader(NamedTuple):
    schema: pa.Schema
    columns: list[str]
    filters: Filters | None
    cast: Container[str]
    batch_rows: int
    salvage: bool

    def read(self, parquet: pq.ParquetFile, file: DataFile, part: Slice) -> Iterator[RowBatch]:
        """The slice's rows; `first` counts from the slice's own first row."""
        done, position = 0, part.first_row
        try:
            for records in self._records(parquet, file, part):
                places = np.arange(position, position + records.num_rows)
                position += records.num_rows
                if self.filters is not None:
                    mask = self.filters.mask(records)
                    places, records = places[mask], records.filter(pa.array(mask))
                if len(places):
                    ids = row_ids(file.path, part.row_group, places)
                    yield RowBatch(done, records.select(self.columns), ids, file.path, part.row_group, places)
                    done += len(places)
        except CorruptInput as error:
            if not self.salvage:
                raise
            yield from self._lost(file, part, done, RowFault(FaultCode.INPUT_CORRUPT, str(error)))
            return
        if done != part.rows:
            raise ChangedError(
                f"row group {part.row_group} gave {done} rows where {part.rows} were planned", file.path
            )

    def _records(self, parquet: pq.ParquetFile, file: DataFile, part: Slice) -> Iterator[pa.RecordBatch]:
        left = part.num_rows
        batches = read_group(
            parquet,
            file.path,
            part.row_group,
            self.schema,
            self.cast,
            self.batch_rows,
            skip=part.first_row,
            constants=constants(file.keys, self.schema),
        )
        for records in batches:
            yield records.slice(0, left)
            left -= records.num_rows
            if left <= 0:
                return

    def _lost(self, file: DataFile, part: Slice, done: int, fault: RowFault) -> Iterator[RowBatch]:
        """The rest of a slice as nulls. Which physical rows they were is unknown where filters chose them:
        their ids count from the slice's first row on."""
        schema = pa.schema([self.schema.field(name) for name in self.columns])
        for first in range(done, part.rows, self.batch_rows):
            count = min(self.batch_rows, part.rows - first)
            known = constants(file.keys, schema)
            lost = [
                pa.repeat(known[f.name], count) if f.name in known else pa.nulls(count, f.type)
                for f in schema
            ]
            nulls = pa.RecordBatch.from_arrays(lost, schema=schema)
            places = part.first_row + np.arange(first, first + count)
            ids = row_ids(file.path, part.row_group, places)
            yield RowBatch(first, nulls, ids, file.path, part.row_group, places, fault)


def _check_unchanged(file: DataFile, storage_options: Mapping[str, Any]) -> pq.FileMetaData:
    """The file's footer. Raises ChangedError where the file is gone or another than was planned."""
    fix = "restore it, or plan again into another output.path"
    try:
        now = stat(file.path, storage_options)
    except FileNotFoundError:
        raise ChangedError("planned, and now gone", file.path, fix) from None
    if (now.size, now.version) != (file.size, file.version):
        was = f"{file.size} bytes, version {file.version}"
        raise ChangedError(
            f"changed since it was planned ({was}; now {now.size} bytes, version {now.version})",
            file.path,
            fix,
        )
    footer = read_footer(file.path, file.size, storage_options)
    if file.footer and footer.digest != file.footer:
        raise ChangedError(
            "replaced since it was planned: same size and time, another footer", file.path, fix
        )
    return footer.metadata


def _check_rows(parquet: pq.ParquetFile, file: DataFile, part: Slice) -> None:
    footer, planned = parquet.metadata, file.group_rows[part.row_group]
    rows = footer.row_group(part.row_group).num_rows if part.row_group < footer.num_row_groups else 0
    if rows != planned:
        raise ChangedError(
            f"row group {part.row_group} has {rows} rows where {planned} were planned", file.path
        )
