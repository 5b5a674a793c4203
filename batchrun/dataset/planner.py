"""How a dataset is cut into partitions: its footers read, its rows counted where filters test them, slices packed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow as pa

from batchrun.dataset.count import Counter, Piece, all_pieces, limited, shortened
from batchrun.dataset.filters import filter_columns, parse_filters
from batchrun.dataset.hive import folder_of
from batchrun.dataset.order import ordered
from batchrun.dataset.plan import Partition, Plan, Slice
from batchrun.dataset.source import DataFile, Source, read_source, untaken
from batchrun.errors import InputError, nearest
from batchrun.job.settings import InputSettings


def make_plan(
    settings: InputSettings,
    needed: Sequence[str],
    rows_per_part: int,
    bytes_per_part: int,
    partition_by: Sequence[str] = (),
    leading: Sequence[str] = (),
    known: Plan | None = None,
) -> Plan:
    """Reads the footers (and with filters the columns they test) and cuts the dataset into partitions.

    `needed` are the columns that the prompt reads. A partition has at most `rows_per_part` rows that pass the filters,
    and at most `bytes_per_part` uncompressed bytes of row groups read for it, all of the same values in `partition_by`,
    which are keys of the input's folders. The plan of a dataset without rows has one empty partition, so that one part
    carries the schema.

    Where `input.order` asks for it, partitions are of rows that are alike in the columns `leading`, which are read;
    a plan of the same files, `known` to be put in order by the same settings, is taken as it is.

    Raises:
        InputError: see `read_source` and `parse_filters`.
    """
    needed = list(dict.fromkeys([*needed, *filter_columns(settings.filters)]))
    source = read_source(settings, [*needed, *partition_by])
    if known is not None and settings.order is not None and known.files == source.files:
        return Plan(source.files, source.schema, known.partitions, source.skipped)
    return _cut(source, settings, rows_per_part, bytes_per_part, partition_by, leading)


def extend(
    earlier: Sequence[Plan],
    settings: InputSettings,
    needed: Sequence[str],
    rows_per_part: int,
    bytes_per_part: int,
    partition_by: Sequence[str] = (),
    leading: Sequence[str] = (),
) -> Plan | None:
    """The plan of the files that none of the `earlier` ones took; None where there are none.

    A file was taken when it stood in a plan, by path, size and version. The columns stay those of the first plan:
    others of the new files are left out.

    Raises:
        ChangedError: a file that was taken is another one now.
        InputError: see `make_plan`; also where a new file's column has another type than the earlier ones.
    """
    new = untaken(settings, {file.path: file for plan in earlier for file in plan.files})
    schema = earlier[0].schema
    if settings.columns is None:
        settings = settings.model_copy(update={"columns": schema.names})
    needed = list(dict.fromkeys([*needed, *filter_columns(settings.filters)]))
    source = read_source(settings, [*needed, *partition_by], new, schema)
    if not source.files:
        return None
    _refuse_other_types(schema, source.schema)
    return _cut(
        source._replace(schema=schema), settings, rows_per_part, bytes_per_part, partition_by, leading
    )


def _refuse_other_types(schema: pa.Schema, new: pa.Schema) -> None:
    if schema.names != new.names:
        raise InputError(
            f"the columns are {', '.join(new.names)} and were {', '.join(schema.names)}",
            "input",
            "set input.columns back, or use another output.path",
        )
    for was, now in zip(schema, new, strict=True):
        # Null is a column without any value: it fits every type.
        if now.type not in (was.type, pa.null()):
            raise InputError(
                f"column {was.name!r} is {now.type} in the new files and was {was.type} in those before",
                "input",
                "write the new files with the same type",
            )


def _cut(
    source: Source,
    settings: InputSettings,
    rows_per_part: int,
    bytes_per_part: int,
    partition_by: Sequence[str],
    leading: Sequence[str],
) -> Plan:
    folders = [_folder(file, partition_by) for file in source.files]
    filters = parse_filters(settings.filters, source.schema)
    pieces: Iterable[Piece] = all_pieces(source.files, rows_per_part, bytes_per_part)
    cut = shortened
    if filters is not None:
        counter = Counter(source.files, source.schema, filters, settings)
        pieces, cut = counter.count(list(pieces)), counter.cut
    pieces = limited(pieces, settings.limit, cut)
    if settings.order is None:
        partitions = _pack(pieces, folders, rows_per_part, bytes_per_part)
    else:
        partitions = ordered(
            pieces, source.files, folders, source.schema, leading, settings, rows_per_part, bytes_per_part
        )
    return Plan(source.files, source.schema, partitions, source.skipped)


def _folder(file: DataFile, partition_by: Sequence[str]) -> str:
    keys = [name for name, _ in file.keys]
    if missing := [name for name in partition_by if name not in keys]:
        raise InputError(
            f"{missing[0]!r} is not a key=value folder of the input{nearest(missing[0], keys)}",
            "output.partition_by",
            f"put the input's files into folders named {missing[0]}=VALUE, or leave it out",
        )
    return folder_of(file.keys, partition_by)


def _pack(
    pieces: Iterable[Piece], folders: Sequence[str], rows_per_part: int, bytes_per_part: int
) -> list[Partition]:
    partitions: list[Partition] = []
    slices: list[Slice] = []
    rows = size = 0
    for piece in pieces:
        full = rows + piece.rows > rows_per_part or size + piece.bytes > bytes_per_part
        if slices and (full or folders[slices[-1].file] != folders[piece.file]):
            partitions.append(Partition(len(partitions), tuple(slices), rows))
            slices, rows, size = [], 0, 0
        _append(slices, piece)
        rows, size = rows + piece.rows, size + piece.bytes
    if slices or not partitions:
        partitions.append(Partition(len(partitions), tuple(slices), rows))
    return partitions


def _append(slices: list[Slice], piece: Piece) -> None:
    """Pieces of one row group become one slice, so that the group is read in one pass; a gap between them
    holds no row that passes the filters."""
    if slices and slices[-1][:2] == (piece.file, piece.row_group):
        last = slices.pop()
        num_rows = piece.first_row + piece.num_rows - last.first_row
        slices.append(last._replace(num_rows=num_rows, rows=last.rows + piece.rows))
    else:
        slices.append(Slice(piece.file, piece.row_group, piece.first_row, piece.num_rows, piece.rows))
