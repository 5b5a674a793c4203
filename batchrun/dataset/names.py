"""A row's name for people: the input file below the input's folder, and the row in it, counted from 0."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import accumulate, chain

import pyarrow as pa

from batchrun.dataset.plan import Partition
from batchrun.dataset.reader import RowBatch
from batchrun.dataset.source import DataFile
from batchrun.job.settings import InputSettings


def names_of(batch: RowBatch, files: Mapping[int, DataFile], settings: InputSettings) -> pa.Array:
    """(rows,) The names of a batch's rows, such as "2026/orders.parquet:123"."""
    file = next(file for file in files.values() if file.path == batch.file)
    return pa.array(_names(file, batch.row_group, batch.places.tolist(), settings), pa.string())


class RowNames:
    """The names of a partition's rows by their number in it, looked up where one is asked for.

    `batches` reads the partition's rows, which only tells which ones the filters keep.
    """

    def __init__(
        self,
        partition: Partition,
        files: Mapping[int, DataFile],
        settings: InputSettings,
        batches: Callable[[], Iterator[RowBatch]],
    ) -> None:
        self._partition, self._files, self._settings, self._batches = partition, files, settings, batches

    def __call__(self, row: int) -> str:
        """The name of the row of this number, from 0 on."""
        if self._settings.filters:
            return self._filtered[row]
        slices = self._partition.slices
        ends = list(accumulate(part.rows for part in slices))
        part = slices[i := bisect_right(ends, row)]
        place = part.first_row + row - (ends[i] - part.rows)
        return _names(self._files[part.file], part.row_group, [place], self._settings)[0]

    @cached_property
    def _filtered(self) -> list[str]:
        named = (names_of(batch, self._files, self._settings).to_pylist() for batch in self._batches())
        return list(chain.from_iterable(named))


def _names(file: DataFile, row_group: int, places: list[int], settings: InputSettings) -> list[str]:
    before = sum(file.group_rows[:row_group])
    shown = _below(file.path, settings)
    return [f"{shown}:{before + place}" for place in places]


def _below(path: str, settings: InputSettings) -> str:
    """The file's path below the folder that all of the input's paths have in common."""
    root, *others = [_folder(one) for one in settings.paths]
    while not all(other.startswith(root) for other in others):
        root = root[: root.rstrip("/").rfind("/") + 1]
    return path.removeprefix(root)


def _folder(path: str) -> str:
    """The folder, with a slash at its end, in front of a path's first wildcard; a file's own folder."""
    plain = path
    for wildcard in "*?[":
        plain = plain.partition(wildcard)[0]
    whole = plain == path and not path.endswith(".parquet")
    return f"{plain.rstrip('/')}/" if whole else plain[: plain.rfind("/") + 1]
