"""`input.order: prefix`: rows whose prompts begin alike go into the same partitions.

What is compared is not the prompts but sketches of the columns that they begin with: checksums of a value's first 64,
128, 256 and so on to 4,096 bytes, and of all of it. Sorted by these, rows with more in common stand closer together.

Rows are brought together within blocks of 32 partitions' worth, so that no row group is read more than some 36 times,
however large the dataset is. Parquet can only be read from a row group's start, and a partition may have a row in each.

The driver's own threads make the sketches, which takes little more than reading: workers are only about to start then,
and a plan without a run has none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from zlib import crc32

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchrun.dataset.count import Piece
from batchrun.dataset.patience import read_with_retries
from batchrun.dataset.plan import Partition, Slice
from batchrun.dataset.reader import RowBatch, read_partition
from batchrun.dataset.source import DataFile, concurrently
from batchrun.errors import Interrupted
from batchrun.job.settings import InputSettings
from batchrun.storage.deadline import told_to_stop

# Partitions' worth of rows, and of bytes, that are put in order together.
BLOCK_PARTITIONS = 32
# A partition may be this much smaller than it has to be, to end where rows begin to differ.
SLACK = 1 / 8
# Ends of the beginnings that are compared, in bytes. The last key of a column is of all its bytes.
ENDS = (64, 128, 256, 512, 1024, 2048, 4096)
KEYS = len(ENDS) + 1
# Rows that one thread reads at a time.
UNIT_ROWS = 1 << 15
# A place in a partition is an int32.
MOST_PLACES = (1 << 31) - 1


@dataclass(frozen=True)
class Sketches:
    """(rows, columns * KEYS) uint32 `keys`, coarse before fine, and (rows, columns) bytes of the columns' values.

    `slices` (rows,) and `places` (rows,) say where the rows are: in which of the slices that were read, and which
    physical row of its row group.
    """

    keys: NDArray[np.uint32]
    lengths: NDArray[np.int64]
    slices: NDArray[np.int64]
    places: NDArray[np.int64]

    @classmethod
    def joined(cls, parts: Sequence[Sketches]) -> Sketches:
        """All of them, one behind the other; there has to be one."""
        columns = ([getattr(part, name) for part in parts] for name in cls.__dataclass_fields__)
        return cls(*(np.concatenate(column) for column in columns))

    def take(self, rows: NDArray[np.int64] | slice) -> Sketches:
        """Those of these rows."""
        return Sketches(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def sorted(self) -> NDArray[np.int64]:
        """(rows,) the rows by their keys; those with equal ones as they are in the input."""
        return np.lexsort(self.keys.T[::-1]) if self.keys.shape[1] else np.arange(len(self.keys))


def ordered(
    pieces: Iterable[Piece],
    files: Sequence[DataFile],
    folders: Sequence[str],
    schema: pa.Schema,
    leading: Sequence[str],
    settings: InputSettings,
    rows_per_part: int,
    bytes_per_part: int,
) -> list[Partition]:
    """The pieces' rows in partitions, block by block; at most so many rows and bytes in each.

    `folders` (files,) are never mixed. `leading` are the columns that prompts begin with, in their order. A row has its
    share of its row group's bytes, or those of these columns where they are more. A page that cannot be decoded counts
    as empty values: its rows will say so when they are read.

    Raises:
        ChangedError, StorageError, InputError: as `read_partition`.
    """
    partitions: list[Partition] = []
    for block in _blocks(
        pieces, folders, BLOCK_PARTITIONS * rows_per_part, BLOCK_PARTITIONS * bytes_per_part
    ):
        slices, share = _whole(block)
        found = sketch(slices, files, schema, leading, settings)
        size = np.maximum(share[found.slices], found.lengths.sum(1))
        order = found.sorted()
        for start, stop in pairwise(_cuts(found.keys[order], size[order], rows_per_part, bytes_per_part)):
            chosen = order[start:stop]
            partitions.append(_partition(len(partitions), slices, found.slices[chosen], found.places[chosen]))
    return partitions or [Partition(0, (), 0)]


def sketch(
    slices: Sequence[Slice],
    files: Sequence[DataFile],
    schema: pa.Schema,
    columns: Sequence[str],
    settings: InputSettings,
) -> Sketches:
    """Reads these columns of the slices' rows, in several threads, and keeps checksums of their beginnings.

    Raises:
        ChangedError, StorageError, InputError: as `read_partition`.
        Interrupted: the process was told to stop.
    """

    def read(unit: list[int]) -> list[Sketches]:
        own = [slices[i] for i in unit]
        ends = np.cumsum([part.rows for part in own])

        def batches(salvage: bool) -> Iterator[RowBatch]:
            return read_partition(
                own,
                {part.file: files[part.file] for part in own},
                schema,
                columns,
                settings.filters,
                settings.cast,
                settings.storage_options,
                salvage=salvage,
            )

        found = []
        for batch in read_with_retries(batches, files[own[0].file].path):
            if told_to_stop():
                raise Interrupted("stopped", files[own[0].file].path, "the same command begins again")
            numbers = np.arange(batch.first, batch.first + batch.records.num_rows)
            number = np.array(unit)[np.searchsorted(ends, numbers, side="right")]
            keys, lengths = _keys(batch.records.select(columns))
            found.append(Sketches(keys, lengths, number, batch.places))
        return found

    remote = any("://" in file.path for file in files)
    return Sketches.joined([one for unit in concurrently(read, list(_units(slices)), remote) for one in unit])


def _blocks(
    pieces: Iterable[Piece], folders: Sequence[str], most_rows: int, most_bytes: int
) -> Iterator[list[Piece]]:
    """Consecutive pieces of one folder, as many as are put in order together."""
    block: list[Piece] = []
    rows = size = places = 0
    for piece in pieces:
        full = rows + piece.rows > most_rows or size + piece.bytes > most_bytes
        # No slice of a partition is longer than its row group up to the last piece.
        length = piece.first_row + piece.num_rows
        full |= places + length > MOST_PLACES
        if block and (full or folders[block[-1].file] != folders[piece.file]):
            yield block
            block, rows, size, places = [], 0, 0, 0
        if piece.rows:
            block.append(piece)
        rows, size, places = rows + piece.rows, size + piece.bytes, places + length
    if block:
        yield block


def _whole(block: Sequence[Piece]) -> tuple[list[Slice], NDArray[np.float64]]:
    """The pieces of each row group as one slice, since a group is read from its start, and (slices,) bytes of a row."""
    slices, share = [], []
    for (file, row_group), own in groupby(block, key=lambda piece: piece[:2]):
        pieces = list(own)
        first, rows = pieces[0].first_row, sum(piece.rows for piece in pieces)
        end = pieces[-1].first_row + pieces[-1].num_rows
        slices.append(Slice(file, row_group, first, end - first, rows))
        share.append(sum(piece.bytes for piece in pieces) / rows)
    return slices, np.array(share)


def _units(slices: Sequence[Slice]) -> Iterator[list[int]]:
    """The numbers of consecutive slices of one file, about UNIT_ROWS rows of it."""
    for _, own in groupby(range(len(slices)), key=lambda i: slices[i].file):
        unit: list[int] = []
        for i in own:
            if unit and sum(slices[k].rows for k in unit) + slices[i].rows > UNIT_ROWS:
                yield unit
                unit = []
            unit.append(i)
        yield unit


def _keys(records: pa.RecordBatch) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """(rows, columns * KEYS) checksums and (rows, columns) bytes."""
    keys = np.zeros((records.num_rows, records.num_columns * KEYS), np.uint32)
    lengths = np.zeros((records.num_rows, records.num_columns), np.int64)
    for i, column in enumerate(records.columns):
        values = _bytes(column)
        keys[:, i * KEYS : (i + 1) * KEYS] = np.array([_checksums(value) for value in values]).reshape(
            -1, KEYS
        )
        lengths[:, i] = [len(value) for value in values]
    return keys, lengths


def _checksums(value: memoryview) -> tuple[int, ...]:
    sums = []
    start = found = 0
    for end in (*ENDS, len(value)):
        if start < len(value):
            found = crc32(value[start:end], found)
        sums.append(found)
        start = end
    return tuple(sums)


def _bytes(column: pa.Array) -> list[memoryview]:
    """A column's values as text, nulls as an empty one."""
    try:
        text = column.cast(pa.string()).cast(pa.large_binary())
    except pa.ArrowException:
        # Lists, structs, and text that is no UTF-8.
        kind = column.type
        if pa.types.is_nested(kind):
            printed = [json.dumps(value, default=str) for value in column.to_pylist()]
            text = pa.array(printed, pa.string()).cast(pa.large_binary())
        else:
            text = column.cast(pa.large_binary())
    ends = np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1].tolist()
    data = memoryview(text.buffers()[2] or b"")
    return [data[start:stop] for start, stop in pairwise(ends)]


def _cuts(
    keys: NDArray[np.uint32], size: NDArray[np.float64], rows_per_part: int, bytes_per_part: int
) -> Iterator[int]:
    """Where partitions of rows in order begin and end: near their bounds, where neighbours have least in common."""
    total = len(keys)
    different = keys[1:] != keys[:-1]
    # The first key in which a row differs from the one before it; as many as there are where they are alike.
    first = np.where(different.any(1), different.argmax(1), keys.shape[1]) if total > 1 else np.zeros(0, int)
    ends = np.cumsum(size)
    start = 0
    while start < total:
        yield start
        before = ends[start - 1] if start else 0.0
        stop = int(np.searchsorted(ends, before + bytes_per_part, side="right"))
        stop = max(start + 1, min(start + rows_per_part, stop))
        if stop < total:
            earliest = stop - int(SLACK * (stop - start))
            stop -= int(first[earliest - 1 : stop][::-1].argmin())
        start = stop
    yield total


def _partition(
    index: int, slices: Sequence[Slice], numbers: NDArray[np.int64], rows: NDArray[np.int64]
) -> Partition:
    """The partition of physical `rows` of the slices of these `numbers`, in this order. Slices of one row group become
    one, which is read in one pass."""
    groups = np.array([part[:2] for part in slices], np.int64)[numbers]
    order = np.lexsort((rows, groups[:, 1], groups[:, 0]))
    starts = np.flatnonzero(np.r_[True, (groups[order][1:] != groups[order][:-1]).any(1)])
    ends = np.r_[starts[1:], len(order)]
    own, places, before = [], np.zeros(len(order), np.int64), 0
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        inside = order[start:end]
        first, last = int(rows[inside[0]]), int(rows[inside[-1]])
        file, row_group = groups[inside[0]].tolist()
        own.append(Slice(file, row_group, first, last - first + 1, end - start))
        places[inside] = before + rows[inside] - first
        before += last - first + 1
    return Partition(index, tuple(own), len(order), places.astype("<i4").tobytes())
