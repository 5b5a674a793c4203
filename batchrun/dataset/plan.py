"""The plan: a dataset cut into partitions, the same on every machine and in every run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, pairwise
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchrun.dataset.hive import folder_of
from batchrun.dataset.source import DataFile, Skipped
from batchrun.errors import OutputError, first_line
from batchrun.hashing import stable_hash
from batchrun.job.output import OutputSettings
from batchrun.job.settings import InputSettings

# How a plan with orders is written: of rows in order, places differ little from one to the next.
ORDERED = {"use_dictionary": False, "column_encoding": {"orders.list.element": "DELTA_BINARY_PACKED"}}


class Slice(NamedTuple):
    """Consecutive rows of one row group: `num_rows` physical ones from `first_row` on, of which `rows` pass
    the filters. `file` is the place in the plan's files."""

    file: int
    row_group: int
    first_row: int
    num_rows: int
    rows: int


@dataclass(frozen=True, slots=True)
class Partition:
    """What one task works off: a few slices, and how many rows they give together.

    Its rows are those of the slices that pass the filters, as they stand there; or with `order` the rows in the places
    that it lists, in its order. A place is counted through the physical rows of all its slices, from 0; `order` has one
    little-endian int32 for each row.
    """

    index: int
    slices: tuple[Slice, ...]
    rows: int
    order: bytes = b""

    @property
    def places(self) -> NDArray[np.int32]:
        """(rows,) the places in `order`; empty where there is none."""
        return np.frombuffer(self.order, "<i4")


class Plan:
    """The partitions of one dataset.

    `files` are sorted by path, `schema` holds the carried and the needed columns, `skipped` the files left
    out.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        schema: pa.Schema,
        partitions: Sequence[Partition],
        skipped: Sequence[Skipped] = (),
    ) -> None:
        self.files, self.schema = list(files), schema
        self.partitions, self.skipped = list(partitions), list(skipped)

    @cached_property
    def rows(self) -> int:
        """Rows that pass the filters and the limit: exactly as many as the output will have."""
        return sum(partition.rows for partition in self.partitions)

    @cached_property
    def hash(self) -> str:
        """Hex SHA-256 of what the plan was made of (path, size, version, rows per group, keys of folders, footer) and
        of how it is cut. A plan made before footers were pinned keeps its hash."""
        files = [
            [
                f.path,
                f.size,
                f.version,
                f.group_rows,
                *([f.keys] if f.keys else []),
                *([f.footer] if f.footer else []),
            ]
            for f in self.files
        ]
        cut = [[p.rows, p.slices, *([_sha256(p.order)] if p.order else [])] for p in self.partitions]
        return stable_hash([files, cut])

    @property
    def bytes_read(self) -> int:
        """Uncompressed bytes that are decoded to read every partition once: of a row group all up to the last row that
        is wanted."""
        return sum(
            file.group_bytes[part.row_group]
            * (part.first_row + part.num_rows)
            // max(1, file.group_rows[part.row_group])
            for partition in self.partitions
            for part in partition.slices
            for file in (self.files[part.file],)
        )

    @property
    def input_bytes(self) -> int:
        """Uncompressed bytes of its rows, by their share of each row group, those included that filters leave out."""
        return sum(
            file.group_bytes[part.row_group] * part.num_rows // max(1, file.group_rows[part.row_group])
            for part in self.in_input_order()
            for file in (self.files[part.file],)
        )

    def in_input_order(self) -> list[Slice]:
        """The slices that the partitions' rows are from, in the input's order, each row in one of them."""
        slices = [part for partition in self.partitions for part in partition.slices]
        if not any(partition.order for partition in self.partitions):
            return slices
        whole: dict[tuple[int, int], Slice] = {}
        for part in slices:
            known = whole.get(part[:2], part)
            first = min(known.first_row, part.first_row)
            end = max(known.first_row + known.num_rows, part.first_row + part.num_rows)
            rows = part.rows if known is part else known.rows + part.rows
            whole[part[:2]] = Slice(part.file, part.row_group, first, end - first, rows)
        return sorted(whole.values())

    def without_footers(self) -> Plan:
        """The same plan as versions made it that did not pin footers."""
        files = [replace(file, footer="") for file in self.files]
        return Plan(files, self.schema, self.partitions, self.skipped)

    def files_of(self, partition: Partition) -> dict[int, DataFile]:
        """The files that a partition reads, by the numbers its slices use: all that has to go along with
        it."""
        return {part.file: self.files[part.file] for part in partition.slices}

    def to_parquet(self) -> bytes:
        """The plan as one Parquet file, a row per data file with its slices nested in it."""
        parts = [(p.index, *s) for p in self.partitions for s in p.slices]
        numbers = np.array(parts, dtype=np.int64).reshape(-1, 6)
        # Partitions that are ordered read from the same files in turn.
        numbers = numbers[np.argsort(numbers[:, 1], kind="stable")]
        ends = np.searchsorted(numbers[:, 1], np.arange(len(self.files) + 1))
        names = ("partition", "row_group", "first_row", "num_rows", "rows")
        slices = pa.StructArray.from_arrays([pa.array(numbers[:, i]) for i in (0, 2, 3, 4, 5)], names=names)
        table = pa.table(
            {
                "path": pa.array([f.path for f in self.files], pa.string()),
                "size": pa.array([f.size for f in self.files], pa.int64()),
                "version": pa.array([f.version for f in self.files], pa.string()),
                "group_rows": pa.array([f.group_rows for f in self.files], pa.list_(pa.int64())),
                "group_bytes": pa.array([f.group_bytes for f in self.files], pa.list_(pa.int64())),
                "footer": pa.array([f.footer for f in self.files], pa.string()),
                "keys": pa.array([json.dumps(f.keys) for f in self.files], pa.string()),
                "slices": pa.ListArray.from_arrays(pa.array(ends, pa.int32()), slices),
                **self._orders(),
            }
        )
        skipped = pa.table(
            {
                "path": pa.array([s.path for s in self.skipped], pa.string()),
                "reason": pa.array([s.reason for s in self.skipped], pa.string()),
            }
        )
        about = {
            b"schema": self.schema.serialize().to_pybytes(),
            b"skipped": _ipc(skipped),
            b"partitions": str(len(self.partitions)).encode(),
            b"hash": self.hash.encode(),
        }
        # Checksums of pages cover no footer, and that is where these stand.
        table = table.replace_schema_metadata({**about, b"digest": _digest(about)})
        sink = pa.BufferOutputStream()
        how = ORDERED if "orders" in table.column_names else {}
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True, **how)
        return cast(bytes, sink.getvalue().to_pybytes())

    def _orders(self) -> dict[str, pa.Array]:
        """The partitions' orders, one behind the other, as a column: all of them in the first row."""
        orders = np.concatenate([np.zeros(0, np.int32), *(p.places for p in self.partitions)])
        if not len(orders):
            return {}
        ends = np.minimum(np.arange(len(self.files) + 1), 1) * len(orders)
        return {"orders": pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(orders, pa.int32()))}

    @classmethod
    def from_parquet(cls, data: bytes) -> Plan:
        """The plan that `to_parquet` gave.

        Raises:
            OutputError: the bytes are damaged or no plan.
        """
        try:
            table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
            about = dict(table.schema.metadata)
            if about.pop(b"digest") != _digest(about):
                raise ValueError("its digest does not match")
            schema = pa.ipc.read_schema(pa.py_buffer(about[b"schema"]))
            skipped = pa.ipc.open_stream(about[b"skipped"]).read_all().to_pylist()
            plan = cls(
                _files(table),
                schema,
                _partitions(table, int(about[b"partitions"])),
                [Skipped(**s) for s in skipped],
            )
            if plan.hash.encode() != about[b"hash"]:
                raise ValueError("its hash does not match")
            return plan
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError) as error:
            reason = first_line(error)
            raise OutputError(
                f"the stored plan is damaged ({reason})",
                "_job/plans",
                "restore it, or use another output.path",
            ) from None


def joined(plans: Sequence[Plan]) -> Plan:
    """The plans of one output as one, in their order: files and partitions are numbered through."""
    if len(plans) == 1:
        return plans[0]
    files: list[DataFile] = []
    partitions: list[Partition] = []
    for plan in plans:
        for partition in plan.partitions:
            slices = tuple(part._replace(file=part.file + len(files)) for part in partition.slices)
            partitions.append(replace(partition, index=len(partitions), slices=slices))
        files += plan.files
    skipped = dict.fromkeys(one for plan in plans for one in plan.skipped)
    return Plan(files, plans[0].schema, partitions, list(skipped))


def carried_columns(
    settings: InputSettings, schema: pa.Schema, partition_by: Sequence[str] = ()
) -> list[str]:
    """The columns of a plan's schema that are in the output's parts, in its order. Readers find those of `partition_by`
    in the parts' folders."""
    names = schema.names if settings.columns is None else dict.fromkeys(settings.columns)
    return [name for name in names if name not in partition_by]


def folders_of(plan: Plan, partition_by: Sequence[str]) -> tuple[tuple[int, str], ...]:
    """The folders of a plan's parts below data/, each with the number of the first partition that is in it."""
    runs: list[tuple[int, str]] = []
    for partition in plan.partitions if partition_by else ():
        file = plan.files[partition.slices[0].file] if partition.slices else None
        folder = folder_of(file.keys, partition_by) if file else ""
        if not runs or runs[-1][1] != folder:
            runs.append((partition.index, folder))
    return tuple(runs)


def check_output_names(carried: Sequence[str], output: OutputSettings) -> None:
    """Refuses output columns whose names are taken, by a carried column or by another output column. Letters of another
    case make no other name: SQL engines do not tell them apart.

    Raises:
        OutputError: suggests a free name.
    """
    taken = {name.casefold(): name for name in (*carried, *output.partition_by)}
    if (name := output.row_column) is not None:
        if name.casefold() in taken:
            what = f"the name {name!r} is a column of the input"
            raise OutputError(what, "output.row_column", "give another name")
        taken[name.casefold()] = name
    for column in output.answer_columns:
        name = output.column(column)
        if (other := taken.get(name.casefold())) is not None:
            free = next(f"{column}_{i}" for i in count(2) if f"{column}_{i}" not in taken)
            by = "" if other == name else f" by {other!r}, which SQL engines take for the same"
            raise OutputError(
                f"the name {name!r} of the {column} column is taken{by}",
                "output.columns",
                f"set output.columns: {{{column}: {free}}}",
            )
        taken[name.casefold()] = name


def difference(old: Plan, new: Plan) -> list[str]:
    """What changed between two plans of one dataset, a line each; empty when they are the same."""
    before, after = ({file.path: file for file in plan.files} for plan in (old, new))
    lines = [f"removed: {path}" for path in before if path not in after]
    lines += [f"added: {path}" for path in after if path not in before]
    for path in before:
        if path in after and (reason := _change(before[path], after[path])):
            lines.append(f"changed: {path} ({reason})")
    if not lines and old.hash != new.hash:
        lines.append(
            f"the same files, cut differently: {len(old.partitions)} partitions of {old.rows} rows, "
            f"now {len(new.partitions)} of {new.rows}"
        )
    return sorted(lines)


def _change(old: DataFile, new: DataFile) -> str:
    if old.size != new.size:
        return f"{old.size} bytes, now {new.size}"
    if old.version != new.version:
        return f"version {old.version}, now {new.version}"
    if old.group_rows != new.group_rows:
        return f"{old.rows} rows in {len(old.group_rows)} row groups, now {new.rows} in {len(new.group_rows)}"
    if old.footer and old.footer != new.footer:
        return "same size and time, another footer: it was replaced"
    if old.keys != new.keys:
        return f"its folder's keys were {dict(old.keys) or 'no columns'} and are {dict(new.keys)}"
    return ""


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(about: dict[bytes, bytes]) -> bytes:
    whole = hashlib.sha256()
    for key in sorted(about):
        whole.update(b"%s %d %s" % (key, len(about[key]), about[key]))
    return whole.hexdigest().encode()


def _ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return cast(bytes, sink.getvalue().to_pybytes())


def _files(table: pa.Table) -> list[DataFile]:
    names = ("path", "size", "version", "group_rows", "group_bytes")
    # Plans of batchrun 0.2 and before know no keys.
    keys = table["keys"].to_pylist() if "keys" in table.column_names else ["[]"] * table.num_rows
    rows = zip(*(table[name].to_pylist() for name in names), keys, _footers(table), strict=True)
    return [
        DataFile(path, size, version, tuple(counts), tuple(sizes), tuple(map(tuple, json.loads(own))), footer)
        for path, size, version, counts, sizes, own, footer in rows
    ]


def _footers(table: pa.Table) -> list[str]:
    """Of each file; empty texts in a plan that was made before footers were pinned."""
    return table["footer"].to_pylist() if "footer" in table.column_names else [""] * table.num_rows


def _partitions(table: pa.Table, total: int) -> list[Partition]:
    nested = table["slices"].combine_chunks()
    files = np.repeat(np.arange(len(nested)), np.diff(nested.offsets.to_numpy()))
    flat = nested.flatten()
    owner = flat.field("partition").to_numpy()
    by_owner = np.argsort(owner, kind="stable")
    columns = (flat.field(name).to_numpy() for name in ("row_group", "first_row", "num_rows", "rows"))
    numbers = (column[by_owner].tolist() for column in (files, *columns))
    slices = [Slice(*values) for values in zip(*numbers, strict=True)]
    ends = np.searchsorted(owner[by_owner], np.arange(total + 1)).tolist()
    orders = b""
    if "orders" in table.column_names:
        orders = table["orders"].combine_chunks().flatten().to_numpy().astype("<i4").tobytes()
    return list(_regroup(slices, ends, orders))


def _regroup(slices: Sequence[Slice], ends: Sequence[int], orders: bytes) -> Iterator[Partition]:
    first = 0
    for index, (start, stop) in enumerate(pairwise(ends)):
        own = tuple(slices[start:stop])
        rows = sum(part.rows for part in own)
        yield Partition(index, own, rows, orders[4 * first : 4 * (first + rows)])
        first += rows
