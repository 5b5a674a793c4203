"""How many rows pass the filters: row groups cut into pieces, and each piece counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchrun.dataset.filters import Filters
from batchrun.dataset.hive import constants, passing
from batchrun.dataset.location import native_filesystem, open_parquet, persistently
from batchrun.dataset.rowgroup import READING, read_group
from batchrun.dataset.source import DataFile, concurrently
from batchrun.errors import CorruptInput, InputError
from batchrun.job.settings import InputSettings
from batchrun.storage import deadline

_COUNT_ROWS = 1 << 16


class Piece(NamedTuple):
    """Consecutive rows of one row group that no partition splits: `num_rows` physical ones, `rows` of them
    pass the filters; `bytes` is its share of the group's uncompressed bytes."""

    file: int
    row_group: int
    first_row: int
    num_rows: int
    rows: int
    bytes: int


def all_pieces(files: Sequence[DataFile], rows_per_part: int, bytes_per_part: int) -> list[Piece]:
    """Every row group in order, cut as evenly as its rows allow where it exceeds a partition's bounds."""
    return [piece for i, file in enumerate(files) for piece in _cut(i, file, rows_per_part, bytes_per_part)]


def limited(
    pieces: Iterable[Piece], limit: int | None, cut: Callable[[Piece, int], Piece]
) -> Iterator[Piece]:
    """The pieces up to `limit` rows; `cut(piece, rows)` shortens the one that exceeds it."""
    left = limit
    for piece in pieces:
        if left is None:
            yield piece
        elif piece.rows < left:
            yield piece
            left -= piece.rows
        else:
            yield piece if piece.rows == left else cut(piece, left)
            return


def shortened(piece: Piece, rows: int) -> Piece:
    """The first `rows` rows of a piece of which every row passes."""
    return piece._replace(num_rows=rows, rows=rows)


class Counter:
    """Counts the rows that pass the filters exactly, by reading the filters' columns alone, in a stream."""

    def __init__(
        self, files: Sequence[DataFile], schema: pa.Schema, filters: Filters, settings: InputSettings
    ) -> None:
        self.files, self.filters, self.settings = files, filters, settings
        self.schema = pa.schema([schema.field(name) for name in filters.columns])

    def count(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """The pieces that some row passes, in order, each with its exact `rows`. Files are read
        concurrently."""
        by_file: dict[int, list[Piece]] = {}
        for piece in pieces:
            by_file.setdefault(piece.file, []).append(piece)
        remote = any("://" in file.path for file in self.files)
        for counted in concurrently(self._count_file, list(by_file.values()), remote):
            yield from counted

    def cut(self, piece: Piece, rows: int) -> Piece:
        """The piece up to the physical row that is its `rows`-th to pass. Raises InputError where fewer pass by now."""
        left = rows
        with self._open(self.files[piece.file]) as parquet:
            for positions in self._matches(parquet, piece):
                inside = positions[positions >= piece.first_row]
                if len(inside) >= left:
                    return piece._replace(num_rows=int(inside[left - 1]) - piece.first_row + 1, rows=rows)
                left -= len(inside)
        raise InputError(
            "changed while it was planned", self.files[piece.file].path, "try again when nothing writes to it"
        )

    def _count_file(self, pieces: Sequence[Piece]) -> list[Piece]:
        file = self.files[pieces[0].file]
        return persistently(file.path, lambda: self._count_once(file, pieces))

    def _count_once(self, file: DataFile, pieces: Sequence[Piece]) -> list[Piece]:
        counted: list[Piece] = []
        with self._open(file) as parquet:
            possible = self._possible_groups(file)
            for group, own in groupby(pieces, key=lambda piece: piece.row_group):
                if group in possible:
                    counted += self._count_group(parquet, list(own))
        return counted

    def _count_group(self, parquet: pq.ParquetFile, pieces: Sequence[Piece]) -> Iterator[Piece]:
        ends = np.array([piece.first_row + piece.num_rows for piece in pieces])
        counts = np.zeros(len(pieces), dtype=np.int64)
        for positions in self._matches(parquet, pieces[0]):
            counts += np.bincount(np.searchsorted(ends, positions, side="right"), minlength=len(pieces))
        return (piece._replace(rows=n) for piece, n in zip(pieces, counts.tolist(), strict=True) if n)

    def _matches(self, parquet: pq.ParquetFile, piece: Piece) -> Iterator[NDArray[np.int64]]:
        """The ascending positions in the piece's row group of the rows that pass, batch by batch."""
        file, start = self.files[piece.file], 0
        known = constants(file.keys, self.schema)
        for batch in read_group(
            parquet, file.path, piece.row_group, self.schema, self.settings.cast, _COUNT_ROWS, constants=known
        ):
            yield start + np.flatnonzero(self.filters.mask(batch))
            start += batch.num_rows

    def _possible_groups(self, file: DataFile) -> set[int]:
        """The row groups that their statistics do not rule out; those of a column that is cast say
        nothing."""
        if any(name in self.settings.cast for name in self.filters.columns):
            return set(range(len(file.group_rows)))
        fields = {name: self.schema.field(name) for name, _ in file.keys if name in self.schema.names}
        left = passing(self.filters, fields, file.keys)
        if left is None:
            return set()
        if not all(left.groups):
            return set(range(len(file.group_rows)))
        # Imports pandas where it is installed: half a second that only filters need.
        import pyarrow.dataset as ds

        fs, inner = native_filesystem(file.path, self.settings.storage_options)
        fragment = ds.ParquetFileFormat().make_fragment(inner, filesystem=fs)
        subset = deadline.within(deadline.UNSIZED, lambda: fragment.subset(filter=left.expression()))
        return {group.id for group in subset.row_groups}

    @contextmanager
    def _open(self, file: DataFile) -> Iterator[pq.ParquetFile]:
        """A page that cannot be decoded is, while planning, a fault of the input as a whole: which rows the
        filters keep is unknown."""
        try:
            with open_parquet(file.path, self.settings.storage_options, **READING) as parquet:
                yield parquet
        except CorruptInput as error:
            raise InputError(
                error.what, error.where, "the filters need it: restore the file or leave it out"
            ) from None


def _cut(index: int, file: DataFile, rows_per_part: int, bytes_per_part: int) -> Iterator[Piece]:
    for group, (rows, size) in enumerate(zip(file.group_rows, file.group_bytes, strict=True)):
        count = min(rows, max(-(-rows // rows_per_part), -(-size // bytes_per_part)))
        for i in range(count):
            first, end = rows * i // count, rows * (i + 1) // count
            yield Piece(index, group, first, end - first, end - first, size * (end - first) // rows)
