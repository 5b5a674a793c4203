"""Input paths to data files with their footers read, and one schema for all of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from batchrun.dataset import hive
from batchrun.dataset.filters import filter_columns, key_filters
from batchrun.dataset.hive import Keys
from batchrun.dataset.location import (
    Found,
    conversion,
    find_files,
    is_damage,
    persistently,
    read_footer,
)
from batchrun.errors import ChangedError, InputError, StorageError, first_line, nearest
from batchrun.job.settings import InputSettings

# Bytes behind the footer of a file with encrypted columns: a nonce and a tag. pyarrow shows no other sign of them, and
# ends the process where such a column is looked at.
SIGNATURE = 28

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class DataFile:
    """A Parquet file as it was planned: path or URL, size in bytes, version (ETag or modification time), for every
    row group its rows and its uncompressed bytes, the keys of its folders that are columns, and the hex SHA-256 of its
    footer.

    `footer` is empty in the plans of versions that did not pin it.
    """

    path: str
    size: int
    version: str
    group_rows: tuple[int, ...]
    group_bytes: tuple[int, ...]
    keys: Keys = ()
    footer: str = ""

    @property
    def rows(self) -> int:
        """Rows of all its row groups, before any filter."""
        return sum(self.group_rows)


class Skipped(NamedTuple):
    """A file that was left out, and why."""

    path: str
    reason: str


class Source(NamedTuple):
    """All files of a dataset, sorted by path, and the schema that they share."""

    files: list[DataFile]
    schema: pa.Schema
    skipped: list[Skipped]


def untaken(settings: InputSettings, taken: Mapping[str, DataFile]) -> list[Found]:
    """The input's files that are not among `taken` (by path); those taken have to be as they were.

    Raises:
        ChangedError: a file was taken and is another one now; names each.
        InputError: no file matches at all.
    """
    found = find_files(settings.paths, settings.storage_options)
    changed = [
        f"{file.path} ({was.size} bytes, version {was.version}; now {file.size} bytes, version {file.version})"
        for file in found
        if (was := taken.get(file.path)) and (was.size, was.version) != (file.size, file.version)
    ]
    if changed:
        shown = "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise ChangedError(
            f"{len(changed)} files changed since their rows were answered: {shown}",
            "input.since",
            "restore them and put new rows into new files, or answer all of it again into another output.path",
        )
    return [file for file in found if file.path not in taken]


def read_source(
    settings: InputSettings,
    needed: Sequence[str],
    found: Sequence[Found] | None = None,
    known: pa.Schema | None = None,
) -> Source:
    """Lists the input's files (or takes those `found`), reads their footers concurrently and holds their schemas
    against each other. Folders named key=value give columns, of the type that `known` has where it has one; files that
    the filters on these rule out are not opened.

    The schema has the carried columns (`settings.columns`, or all) and then those of `needed` that are not
    among them, every one nullable, with the types of `settings.cast` where it names one. A carried column
    that some files lack is null there; a needed one has to be in all of them.

    Raises:
        InputError: no file matches; files that are no Parquet (every one is named, unless `skip_bad_files`);
            columns that appear twice, are missing, or differ in type; a cast that cannot be.
    """
    growing = found is not None
    found = find_files(settings.paths, settings.storage_options) if found is None else found
    fields = _key_fields(found, settings, known)
    found = _pruned(found, settings, fields)
    footers = list(
        concurrently(lambda file: _read_footer(file, settings.storage_options), found, remote=_remote(found))
    )
    good = [(file, schema) for file, schema, reason in footers if not reason]
    bad = [Skipped(file.path, reason) for file, _, reason in footers if reason]
    if growing and not good and (settings.skip_bad_files or not bad):
        return Source([], pa.schema([]), bad)
    if bad and not (settings.skip_bad_files and good):
        names = "; ".join(f"{file.path}: {file.reason}" for file in bad)
        raise InputError(
            f"{len(bad)} of {len(footers)} files cannot be read as Parquet: {names}",
            "input.path",
            "fix or remove them, or set input.skip_bad_files: true" if good else "give Parquet files",
        )
    good = [_with_keys(file, schema, fields) for file, schema in good]
    return Source([file for file, _ in good], _shared_schema(good, settings, needed), bad)


def _key_fields(
    found: Sequence[Found], settings: InputSettings, known: pa.Schema | None
) -> dict[str, pa.Field]:
    """The columns of the folders' keys; a key that is a column of the files too is read from them."""
    fields = hive.key_fields((file.keys for file in found), known)
    if not fields:
        return {}
    footers = (_read_footer(file, settings.storage_options) for file in found)
    own: list[str] = next((schema.names for _, schema, reason in footers if not reason), [])
    fields = {name: field for name, field in fields.items() if name not in own}
    for name, field in fields.items():
        kind = _cast_type(name, settings.cast[name]) if name in settings.cast else field.type
        fields[name] = field.with_type(kind)
        for file in found:
            value = dict(file.keys).get(name, hive.NULL)
            try:
                hive.scalar_of(value, kind)
            except pa.ArrowException:
                raise InputError(
                    f"the folder {name}={value} is not of type {kind}",
                    file.path,
                    f"set input.cast: {{{name}: string}}",
                ) from None
    return fields


def _pruned(
    found: Sequence[Found], settings: InputSettings, fields: Mapping[str, pa.Field]
) -> Sequence[Found]:
    """The files of which rows may pass the filters, as far as their folders tell; one where there is none, so that
    there is a schema."""
    tested = [name for name in filter_columns(settings.filters) if name in fields]
    if not tested:
        return found
    filters = key_filters(settings.filters, pa.schema(fields.values()))
    left = [file for file in found if hive.passing(filters, fields, file.keys) is not None]
    return left or found[:1]


def _with_keys(
    file: DataFile, schema: pa.Schema, fields: Mapping[str, pa.Field]
) -> tuple[DataFile, pa.Schema]:
    keys = tuple((name, value) for name, value in file.keys if name in fields)
    if both := [name for name, _ in keys if name in schema.names]:
        raise InputError(
            f"{both[0]!r} is a column of this file and only a folder's key of others",
            file.path,
            "write it into all files, or into none",
        )
    for name, _ in keys:
        schema = schema.append(fields[name])
    return replace(file, keys=keys), schema


def concurrently(work: Callable[[T], U], items: Sequence[T], remote: bool) -> Iterable[U]:
    """`map` over threads, in order: many where a network is waited for, a few where a disk is."""
    workers = 32 if remote else min(8, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="footers")
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def parse_type(name: str) -> pa.DataType:
    """A pyarrow type from its name as pyarrow prints it: int64, string, date32, timestamp[us, tz=UTC],
    decimal128(10, 2), list<string>.

    Raises:
        ValueError: no such type.
    """
    name = name.strip()
    if match := re.fullmatch(r"timestamp\[(s|ms|us|ns), *tz=([^\]]+)\]", name):
        return pa.timestamp(match[1], match[2].strip())
    if match := re.fullmatch(r"decimal(?:128)?\((\d+), *(-?\d+)\)", name):
        return pa.decimal128(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(large_)?list<(?:(?:item|element): *)?(.+)>", name):
        return (pa.large_list if match[1] else pa.list_)(parse_type(match[2]))
    return pa.type_for_alias(name)


def _remote(found: Sequence[Found]) -> bool:
    return any("://" in file.path for file in found)


def _read_footer(file: Found, storage_options: Mapping[str, Any]) -> tuple[DataFile, pa.Schema, str]:
    """The planned file and its schema, or the reason why there is none."""

    def read() -> tuple[DataFile, pa.Schema, str]:
        footer = read_footer(file.path, file.size, storage_options)
        if footer.size - footer.metadata.serialized_size == SIGNATURE:
            raise InputError(
                "the file has encrypted columns", file.path, "write it without encryption, or leave it out"
            )
        groups = [footer.metadata.row_group(i) for i in range(footer.metadata.num_row_groups)]
        rows = tuple(group.num_rows for group in groups)
        sizes = tuple(group.total_byte_size for group in groups)
        planned = DataFile(file.path, file.size, file.version, rows, sizes, file.keys, footer.digest)
        return planned, footer.schema, ""

    try:
        return persistently(file.path, read)
    except (StorageError, InputError):
        raise
    except Exception as error:
        # Every store's client has errors of its own.
        if not is_damage(error):
            raise InputError(
                f"cannot be opened ({type(error).__name__}: {error})", file.path, "check access and try again"
            ) from None
        if text := conversion(file.path):
            raise text from None
        reason = "it is empty" if file.size == 0 else first_line(error).rstrip(".")
        return DataFile(file.path, file.size, file.version, (), ()), pa.schema([]), reason


def _shared_schema(
    files: Sequence[tuple[DataFile, pa.Schema]], settings: InputSettings, needed: Sequence[str]
) -> pa.Schema:
    shapes = _distinct(files)
    _refuse_duplicates(shapes)
    known = list(dict.fromkeys(name for schema, _ in shapes for name in schema.names))
    wanted = list(dict.fromkeys([*(known if settings.columns is None else settings.columns), *needed]))
    # Rows of no columns could not be counted.
    wanted = wanted or known[:1]
    for name in [*wanted, *settings.cast]:
        if name not in known:
            raise InputError(f"no input file has a column {name!r}{nearest(name, known)}", "input")
    _refuse_missing(shapes, needed)
    casts = {name: _cast_type(name, text) for name, text in settings.cast.items()}
    fields = [
        pa.field(name, _column_type(name, shapes, casts.get(name)), metadata=_metadata(name, files))
        for name in wanted
    ]
    return pa.schema(fields, metadata=files[0][1].metadata)


def _metadata(name: str, files: Sequence[tuple[DataFile, pa.Schema]]) -> dict[bytes, bytes] | None:
    """A field's metadata as the first file has them that has the field: an unknown extension type is in there."""
    return next((schema.field(name).metadata for _, schema in files if name in schema.names), None)


def _distinct(files: Sequence[tuple[DataFile, pa.Schema]]) -> list[tuple[pa.Schema, list[str]]]:
    """Each different schema once, with the paths of its files: thousands of files mostly share one."""
    shapes: dict[bytes, tuple[pa.Schema, list[str]]] = {}
    for file, schema in files:
        bare = schema.remove_metadata()
        shapes.setdefault(bare.serialize().to_pybytes(), (bare, []))[1].append(file.path)
    return list(shapes.values())


def _refuse_duplicates(shapes: Sequence[tuple[pa.Schema, list[str]]]) -> None:
    faults = []
    for schema, paths in shapes:
        if len(set(schema.names)) < len(schema.names):
            names = sorted({name for name in schema.names if schema.names.count(name) > 1})
            faults.append(f"{', '.join(map(repr, names))} in {_some(paths)}")
    if faults:
        raise InputError(
            f"column names that appear twice: {'; '.join(faults)}", "input", "rename one of the two"
        )


def _refuse_missing(shapes: Sequence[tuple[pa.Schema, list[str]]], needed: Sequence[str]) -> None:
    lacking = {
        name: [p for schema, paths in shapes if name not in schema.names for p in paths] for name in needed
    }
    faults = [f"{name!r} in {_some(paths)}" for name, paths in lacking.items() if paths]
    if faults:
        raise InputError(
            f"columns that the prompt or the filters need are missing: {'; '.join(faults)}",
            "input",
            "add them, or leave those files out of input.path",
        )


def _column_type(
    name: str, shapes: Sequence[tuple[pa.Schema, list[str]]], cast: pa.DataType | None
) -> pa.DataType:
    types: dict[pa.DataType, list[str]] = {}
    for schema, paths in shapes:
        if name in schema.names:
            types.setdefault(schema.field(name).type, []).extend(paths)
    if len(types) > 1:
        # What writers give a column without any value: it fits every type.
        types.pop(pa.null(), None)
    if cast is None:
        if len(types) > 1:
            shown = "; ".join(f"{kind} in {_some(paths)}" for kind, paths in types.items())
            raise InputError(
                f"column {name!r} differs between files: {shown}",
                "input",
                f"set input.cast: {{{name}: TYPE}}",
            )
        return next(iter(types))
    for kind, paths in types.items():
        try:
            pa.nulls(0, kind).cast(cast)
        except pa.ArrowException:
            raise InputError(
                f"column {name!r} is {kind} in {_some(paths)}, which cannot be cast to {cast}",
                "input.cast",
                "cast it to another type, such as string, or leave it out",
            ) from None
    return cast


def _cast_type(name: str, text: str) -> pa.DataType:
    try:
        return parse_type(text)
    except ValueError:
        raise InputError(
            f"column {name!r}: {text!r} is not a type",
            "input.cast",
            "use pyarrow's names: string, int64, timestamp[us]",
        ) from None


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more
