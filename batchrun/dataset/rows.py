"""A partition's rows as a job reads them: filtered, cast, read again where a page is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchrun.dataset.names import names_of
from batchrun.dataset.patience import read_with_retries
from batchrun.dataset.plan import Partition, Plan
from batchrun.dataset.reader import RowBatch, located, read_partition
from batchrun.dataset.source import DataFile
from batchrun.job.job import Job

# Rows read at once. With a damaged page, so many in front of it may be lost as well.
BATCH_ROWS, SALVAGE_ROWS = 1024, 64
PLACE = pa.schema(
    [
        pa.field("source_file", pa.string()),
        pa.field("source_row_group", pa.int32()),
        pa.field("source_row", pa.int64()),
    ]
)

# A partition's rows as places, schema PLACE, in order.
Places = Callable[[int], Iterable[pa.RecordBatch]]


def read_rows(
    job: Job, schema: pa.Schema, partition: Partition, files: Mapping[int, DataFile], columns: Sequence[str]
) -> Iterator[RowBatch]:
    """A partition's input rows in order, `columns` only, as the job filters and casts them.

    Rows of a page that cannot be decoded, read twice, are nulls with a fault.
    """
    settings = job.input

    def read(salvage: bool) -> Iterator[RowBatch]:
        return read_partition(
            partition.slices,
            files,
            schema,
            columns,
            settings.filters,
            settings.cast,
            settings.storage_options,
            batch_rows=SALVAGE_ROWS if salvage else BATCH_ROWS,
            salvage=salvage,
            order=partition.places if partition.order else None,
        )

    return read_with_retries(read, job.input.paths[0])


def rows_of(job: Job, plan: Plan, partition: Partition, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """What stands beside the answers of a partition of the whole plan."""
    files = plan.files_of(partition)
    batches = read_rows(job, plan.schema, partition, files, columns)
    return (carried(batch, files, job) for batch in batches)


def carried(batch: RowBatch, files: Mapping[int, DataFile], job: Job) -> pa.RecordBatch:
    """The batch's columns, and the rows' names where the job wants them as a column."""
    name = job.output.row_column
    if name is None:
        return batch.records
    return pa.RecordBatch.from_arrays(
        [*batch.records.columns, names_of(batch, files, job.input)],
        schema=carried_schema(batch.records.schema, job),
    )


def carried_schema(schema: pa.Schema, job: Job) -> pa.Schema:
    """The columns of `schema`, and the rows' names where the job wants them."""
    name = job.output.row_column
    return schema if name is None else schema.append(pa.field(name, pa.string()))


def places_of(
    job: Job, schema: pa.Schema, partition: Partition, files: Mapping[int, DataFile]
) -> Iterator[pa.RecordBatch]:
    """Where in the input a partition's rows stand, in order (schema `PLACE`)."""
    numbers = list(files)
    paths = pa.array([files[number].path for number in numbers], pa.string())
    for found in _places(job, schema, partition, files):
        index = pa.array([numbers.index(number) for number in found[0].tolist()], pa.int32())
        columns = [paths.take(index), pa.array(found[1], pa.int32()), pa.array(found[2])]
        yield pa.RecordBatch.from_arrays(columns, schema=PLACE)


def _places(
    job: Job, schema: pa.Schema, partition: Partition, files: Mapping[int, DataFile]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """File, row group and row of a partition's rows; only those that filters choose have to be read."""
    if partition.order:
        yield located(partition.slices, partition.places)
        return
    for batch in read_rows(job, schema, partition, files, ()):
        yield batch.files, batch.row_groups, batch.places


def places_in(job: Job, plan: Plan) -> Places:
    """`places_of` by a partition's number in the plan."""

    def places(index: int) -> Iterator[pa.RecordBatch]:
        partition = plan.partitions[index]
        return places_of(job, plan.schema, partition, plan.files_of(partition))

    return places


def all_rows(job: Job, plan: Plan, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The plan's rows that can be read, in the input's order; take as many as are wanted."""
    for part in plan.in_input_order():
        partition = Partition(0, (part,), part.rows)
        batches = read_rows(job, plan.schema, partition, plan.files_of(partition), columns)
        yield from (batch.records for batch in batches if batch.fault is None)
