"""A partition to record batches, exactly the rows that were planned."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise, repeat
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchrun.dataset.filters import Filters, filter_columns, parse_filters
from batchrun.dataset.hive import constants
from batchrun.dataset.location import open_parquet, read_footer, stat
from batchrun.dataset.plan import Slice
from batchrun.dataset.rowgroup import CHANGED_FIX, READING, read_group
from batchrun.dataset.source import DataFile
from batchrun.errors import ChangedError, CorruptInput, FaultCode, RowFault


class RowBatch(NamedTuple):
    """Consecutive rows of a partition.

    `first` is the place of its first row among the partition's rows, `records` the rows, and `row_ids`
    (rows,) uint64 a stable number of each: it depends on the row's file, row group and place there alone, not
    on how the dataset is cut. `files` (by the plan's numbers), `row_groups` and `places`, each (rows,) int64, are
    these. With a `fault` the rows could not be read, and every value in `records` is null.
    """

    first: int
    records: pa.RecordBatch
    row_ids: NDArray[np.uint64]
    files: NDArray[np.int64]
    row_groups: NDArray[np.int64]
    places: NDArray[np.int64]
    fault: RowFault | None = None

    def from_row(self, row: int) -> RowBatch:
        """The batch without its first `row` rows."""
        return RowBatch(
            self.first + row,
            self.records.slice(row),
            self.row_ids[row:],
            self.files[row:],
            self.row_groups[row:],
            self.places[row:],
            self.fault,
        )


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
    order: NDArray[np.int32] | None = None,
) -> Iterator[RowBatch]:
    """The rows of a partition's slices, in order, `batch_rows` or fewer at a time, with `columns` as `schema`
    has them.

    `files`, `schema` are the plan's (`plan.files_of(partition)`, `plan.schema`); `filters`, `cast` and
    `storage_options` the job's. Memory stays flat however large a row group is. With `salvage`, the rows of a
    slice from its first undecodable page on come as batches of nulls with a fault, and the slices after it
    are read. With `order`, the rows are those in its places (`Partition.places`), in its order, and are held in
    memory once all slices are read; `filters` are not asked again.

    Raises:
        ChangedError: a file is gone or another than was planned, or gives another number of rows.
        CorruptInput: a page cannot be decoded; not with `salvage`.
        InputError: a value that cannot be cast as the job asks.
    """
    if order is not None:
        filters = None
    tested = parse_filters(filters, schema)
    wanted = dict.fromkeys([*columns, *filter_columns(filters)])
    # Rows of no columns at all could not be counted.
    read = pa.schema([schema.field(name) for name in wanted or schema.names[:1]])
    reader = _Reader(read, list(columns), tested, cast, batch_rows, salvage)

    def batches() -> Iterator[RowBatch]:
        first, chosen = 0, repeat(None) if order is None else iter(_chosen(slices, order))
        for number, own in groupby(slices, key=lambda part: part.file):
            file = files[number]
            metadata = _check_unchanged(file, storage_options)
            with open_parquet(file.path, storage_options, metadata=metadata, **READING) as parquet:
                for part in own:
                    _check_rows(parquet, file, part)
                    for batch in reader.read(parquet, file, part, next(chosen)):
                        yield batch._replace(first=first + batch.first)
                    first += part.rows

    return batches() if order is None else _rearranged(batches(), order, batch_rows)


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


def located(
    slices: Sequence[Slice], order: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(rows,) file, row group and physical row in it of each place in `order`."""
    starts, place = _starts(slices), order.astype(np.int64)
    numbers = np.searchsorted(starts, place, side="right") - 1
    columns = np.array([part[:3] for part in slices], np.int64).reshape(-1, 3)[numbers].T
    return columns[0], columns[1], columns[2] + place - starts[numbers]


def _starts(slices: Sequence[Slice]) -> NDArray[np.int64]:
    """(slices,) the place at which each slice begins."""
    return np.cumsum([0, *(part.num_rows for part in slices[:-1])])


def _chosen(slices: Sequence[Slice], order: NDArray[np.int32]) -> list[NDArray[np.int64]]:
    """The physical rows of each slice that are in `order`, ascending."""
    starts, ascending = _starts(slices), np.sort(order).astype(np.int64)
    own = np.split(ascending, np.searchsorted(ascending, starts[1:]))
    return [rows + part.first_row - start for part, start, rows in zip(slices, starts, own, strict=True)]


def _rearranged(batches: Iterable[RowBatch], order: NDArray[np.int32], batch_rows: int) -> Iterator[RowBatch]:
    """Batches of the rows at the places of `order`, ascending, as batches of them in its order."""
    read = list(batches)
    if not read:
        return
    rank = np.empty(len(order), np.int64)
    rank[np.argsort(order)] = np.arange(len(order))
    starts = np.array([batch.first for batch in read])
    number = np.searchsorted(starts, rank, side="right") - 1
    ids = np.concatenate([batch.row_ids for batch in read])[rank]
    files = np.concatenate([batch.files for batch in read])[rank]
    groups = np.concatenate([batch.row_groups for batch in read])[rank]
    places = np.concatenate([batch.places for batch in read])[rank]
    faults = [batch.fault for batch in read]
    # The first batch with the same fault stands for it: a batch has one fault, or none.
    kind = np.array([faults.index(fault) for fault in faults])[number]
    ends = np.union1d(np.flatnonzero(np.diff(kind)) + 1, np.arange(batch_rows, len(order), batch_rows))
    for start, end in pairwise([0, *ends.tolist(), len(order)]):
        rows = slice(start, end)
        records = _taken(read, number[rows], (rank - starts[number])[rows])
        fault = faults[kind[start]]
        yield RowBatch(start, records, ids[rows], files[rows], groups[rows], places[rows], fault)


def _taken(
    batches: Sequence[RowBatch], numbers: NDArray[np.int64], rows: NDArray[np.int64]
) -> pa.RecordBatch:
    """Of each batch `numbers` the row `rows`, as one batch. All batches as one array might exceed what it can hold."""
    by_batch = np.argsort(numbers, kind="stable")
    owners, first = np.unique(numbers[by_batch], return_index=True)
    pieces = [
        batches[owner].records.take(pa.array(rows[own]))
        for owner, own in zip(owners.tolist(), np.split(by_batch, first[1:]), strict=True)
    ]
    back = np.empty(len(rows), np.int64)
    back[by_batch] = np.arange(len(rows))
    (together,) = pa.Table.from_batches(pieces).combine_chunks().to_batches()
    return together.take(pa.array(back))


class _Reader(NamedTuple):
    schema: pa.Schema
    columns: list[str]
    filters: Filters | None
    cast: Container[str]
    batch_rows: int
    salvage: bool

    def read(
        self, parquet: pq.ParquetFile, file: DataFile, part: Slice, chosen: NDArray[np.int64] | None
    ) -> Iterator[RowBatch]:
        """The slice's rows, or those `chosen` by their ascending numbers in the row group; `first` counts from the
        slice's own first row."""
        done, position = 0, part.first_row
        try:
            for records in self._records(parquet, file, part):
                places = np.arange(position, position + records.num_rows)
                position += records.num_rows
                if chosen is not None:
                    places = chosen[slice(*np.searchsorted(chosen, (places[0], position)))]
                    records = records.take(pa.array(places - (position - records.num_rows)))
                elif self.filters is not None:
                    mask = self.filters.mask(records)
                    places, records = places[mask], records.filter(pa.array(mask))
                if len(places):
                    yield self._batch(file, part, done, records.select(self.columns), places)
                    done += len(places)
        except CorruptInput as error:
            if not self.salvage:
                raise
            fault = RowFault(FaultCode.INPUT_CORRUPT, str(error))
            yield from self._lost(file, part, done, fault, chosen)
            return
        if done != part.rows:
            raise ChangedError(
                f"row group {part.row_group} gave {done} rows where {part.rows} were planned",
                file.path,
                CHANGED_FIX,
            )

    def _batch(
        self,
        file: DataFile,
        part: Slice,
        first: int,
        records: pa.RecordBatch,
        places: NDArray[np.int64],
        fault: RowFault | None = None,
    ) -> RowBatch:
        ids = row_ids(file.path, part.row_group, places)
        numbers, groups = np.full_like(places, part.file), np.full_like(places, part.row_group)
        return RowBatch(first, records, ids, numbers, groups, places, fault)

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

    def _lost(
        self, file: DataFile, part: Slice, done: int, fault: RowFault, chosen: NDArray[np.int64] | None
    ) -> Iterator[RowBatch]:
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
            if chosen is not None:
                places = chosen[first : first + count]
            yield self._batch(file, part, first, nulls, places, fault)


def _check_unchanged(file: DataFile, storage_options: Mapping[str, Any]) -> pq.FileMetaData:
    """The file's footer. Raises ChangedError where the file is gone or another than was planned."""
    try:
        now = stat(file.path, storage_options)
    except FileNotFoundError:
        raise ChangedError("planned, and now gone", file.path, CHANGED_FIX) from None
    if (now.size, now.version) != (file.size, file.version):
        was = f"{file.size} bytes, version {file.version}"
        raise ChangedError(
            f"changed since it was planned ({was}; now {now.size} bytes, version {now.version})",
            file.path,
            CHANGED_FIX,
        )
    footer = read_footer(file.path, file.size, storage_options)
    if file.footer and footer.digest != file.footer:
        raise ChangedError(
            "replaced since it was planned: same size and time, another footer", file.path, CHANGED_FIX
        )
    return footer.metadata


def _check_rows(parquet: pq.ParquetFile, file: DataFile, part: Slice) -> None:
    footer, planned = parquet.metadata, file.group_rows[part.row_group]
    rows = footer.row_group(part.row_group).num_rows if part.row_group < footer.num_row_groups else 0
    if rows != planned:
        raise ChangedError(
            f"row group {part.row_group} has {rows} rows where {planned} were planned", file.path, CHANGED_FIX
        )
