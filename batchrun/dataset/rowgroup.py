"""One row group as a stream of record batches, with the types of the plan."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from types import MappingProxyType

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.dataset.location import is_damage
from batchrun.errors import ChangedError, CorruptInput, InputError, first_line

# pre_buffer would hold a whole row group (tried: +1105 MB, against +31 MB without, for a group of 382 MB).
READING = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
# Where a file is not what was planned any more.
CHANGED_FIX = "restore it, or plan again into another output.path"


def read_group(
    parquet: pq.ParquetFile,
    path: str,
    group: int,
    schema: pa.Schema,
    cast: Container[str],
    batch_rows: int,
    skip: int = 0,
    constants: Mapping[str, pa.Scalar] = MappingProxyType({}),
) -> Iterator[pa.RecordBatch]:
    """The rows of row group `group` from row `skip` on, `batch_rows` or fewer at a time, as `schema` has
    them.

    Memory stays that of a batch and of one buffer per column, however large the group is. Skipped rows are
    decoded but never converted: pyarrow cannot start inside a row group. A column that the file lacks is
    one of `constants`, or null.

    Raises:
        CorruptInput: a page that cannot be decoded.
        ChangedError: a column has another type than planned and is not in `cast`.
        InputError: a value that cannot be cast without loss.
    """
    own = parquet.schema_arrow.names
    # Rows of no columns at all could not be counted.
    present = [name for name in schema.names if name in own and name not in constants] or own[:1]
    batches = parquet.iter_batches(batch_size=batch_rows, row_groups=[group], columns=present)
    where = f"{path}, row group {group}"
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            if not is_damage(error):
                raise
            reason = first_line(error)
            raise CorruptInput(f"a page cannot be decoded ({reason})", where, "restore the file") from None
        if batch is None:
            return
        if batch.num_rows <= skip:
            skip -= batch.num_rows
            continue
        kept = batch.slice(skip)
        skip = 0
        yield pa.RecordBatch.from_arrays(
            [_column(kept, field, cast, where, constants) for field in schema], schema=schema
        )


def _column(
    batch: pa.RecordBatch,
    field: pa.Field,
    cast: Container[str],
    where: str,
    constants: Mapping[str, pa.Scalar],
) -> pa.Array:
    if field.name in constants:
        return pa.repeat(constants[field.name], batch.num_rows)
    values = batch.column(field.name) if field.name in batch.schema.names else pa.nulls(batch.num_rows)
    if values.type == field.type:
        return values
    if pa.types.is_null(values.type):
        return pa.nulls(batch.num_rows, field.type)
    if field.name not in cast:
        raise ChangedError(
            f"column {field.name!r} was planned as {field.type} and is now {values.type}", where, CHANGED_FIX
        )
    try:
        return values.cast(field.type)
    except pa.ArrowException as error:
        raise InputError(
            f"column {field.name!r} cannot be cast to {field.type} ({error})",
            where,
            "fix the value or input.cast",
        ) from None
