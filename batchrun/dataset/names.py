"""A row's name for people: the input file below the input's folder, and the row in it, counted from 0."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import accumulate, chain

import numpy as np
import pyarrow as pa

from batchrun.dataset.plan import Partition
from batchrun.dataset.reader import RowBatch, located
from batchrun.dataset.source import DataFile
from batchrun.job.settings import InputSettings


def names_of(batch: RowBatch, files: Mapping[int, DataFile], settings: InputSettings) -> pa.Array:
    """(rows,) The names of a batch's rows, such as "2026/orders.parquet:123"."""
    shown = {number: _below(files[number].path, settings) for number in np.unique(batch.files).tolist()}
    before = {number: [0, *accumulate(files[number].group_rows)] for number in shown}
    where = zip(batch.files.tolist(), batch.row_groups.tolist(), batch.places.tolist(), strict=True)
    return pa.array(
        [f"{shown[file]}:{before[file][group] + place}" for file, group, place in where], pa.string()
    )


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
        slices = self._partition.slices
        if self._partition.order:
            file, group, place = (
                int(one[0]) for one in located(slices, self._partition.places[row : row + 1])
            )
            return _name(self._files[file], group, place, self._settings)
        if self._settings.filters:
            return self._filtered[row]
        ends = list(accumulate(part.rows for part in slices))
        part = slices[i := bisect_right(ends, row)]
        place = part.first_row + row - (ends[i] - part.rows)
        return _name(self._files[part.file], part.row_group, place, self._settings)

    @cached_property
    def _filtered(self) -> list[str]:
        named = (names_of(batch, self._files, self._settings).to_pylist() for batch in self._batches())
        return list(chain.from_iterable(named))


def _name(file: DataFile, row_group: int, place: int, settings: InputSettings) -> str:
    return f"{_below(file.path, settings)}:{sum(file.group_rows[:row_group]) + place}"


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
