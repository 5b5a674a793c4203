"""Where data files lie: fsspec URLs to listed files, and one listed file to an open Parquet file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem
from pyarrow.fs import LocalFileSystem as NativeFileSystem

from batchrun.dataset.hive import Keys, keys_of
from batchrun.errors import InputError, StorageError
from batchrun.storage import deadline
from batchrun.storage.backoff import back_off, kept_failing
from batchrun.storage.faults import is_transient
from batchrun.storage.protocols import refuse_unknown

T = TypeVar("T")

# Seconds that a busy store is asked again while planning.
PATIENCE = 10.0
# Seconds, for `back_off`.
FIRST_WAIT, LONGEST_WAIT = 0.5, 4.0

# One ranged read that holds the footer of nearly every file.
_TAIL_BYTES = 64 << 10

# What stores call the thing that changes when an object's bytes change, the most telling one first.
_VERSION_KEYS = (
    "ETag",
    "etag",
    "generation",
    "md5Hash",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)


class Found(NamedTuple):
    """A listed file: its full path or URL, its size in bytes, its version (ETag or modification time), and the keys
    of the folders named key=value below the input's own path."""

    path: str
    size: int
    version: str
    keys: Keys = ()


def find_files(paths: Sequence[str], storage_options: Mapping[str, Any]) -> list[Found]:
    """The files that paths, folders and globs name, each once, sorted by path.

    In folders these are the `*.parquet` at any depth; whatever starts with `_` or `.` is left out there and
    in globs, as every Parquet reader does.

    Raises:
        InputError: a path that names nothing, or a store that cannot be listed.
    """
    found = {file.path: file for path in paths for file in _expand(path, storage_options)}
    return [found[path] for path in sorted(found)]


def persistently(where: str, ask: Callable[[], T]) -> T:
    """What `ask()` gives, which is asked again while the store at `where` is only busy.

    Raises:
        StorageError: it was busy for ten seconds and more.
        Exception: whatever else `ask` raises.
    """
    try:
        return back_off(where, PATIENCE, FIRST_WAIT, LONGEST_WAIT)(ask)
    except Exception as error:
        if not is_transient(error):
            raise
        raise kept_failing(error, where) from error


def stat(path: str, storage_options: Mapping[str, Any]) -> Found:
    """The file as the store has it now, past every cache. FileNotFoundError when it is gone."""
    fs, inner = filesystem(path, storage_options)
    fs.invalidate_cache(inner)
    return _found(path, _info(fs, inner))


def version_of(info: Mapping[str, Any]) -> str:
    """What fsspec's answer about a file says about its content's version; empty when it says nothing."""
    version = next((info[key] for key in _VERSION_KEYS if info.get(key) is not None), "")
    # Listings and single answers of one store may differ in this.
    if isinstance(version, datetime):
        version = version.timestamp()
    return str(version).strip('"')


def filesystem(path: str, storage_options: Mapping[str, Any]) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path inside it. Raises InputError where its protocol or options do not
    work here."""
    refuse_unknown(path, InputError)
    try:
        fs, inner = fsspec.url_to_fs(path, **storage_options)
        return fs, inner
    except (ImportError, ValueError) as error:
        raise InputError(
            f"cannot be accessed ({error})", path, "check the URL and input.storage_options"
        ) from None


def native_filesystem(path: str, storage_options: Mapping[str, Any]) -> tuple[FileSystem, str]:
    """The same for pyarrow: its own file system on a local disk, fsspec's everywhere else."""
    fs, inner = filesystem(path, storage_options)
    return (NativeFileSystem() if isinstance(fs, LocalFileSystem) else PyFileSystem(FSSpecHandler(fs))), inner


class Footer(NamedTuple):
    """A Parquet file's footer as pyarrow reads it, the file's schema, and the footer's bytes: how many, and their hex
    SHA-256."""

    metadata: pq.FileMetaData
    schema: pa.Schema
    size: int
    digest: str


def read_footer(path: str, size: int, storage_options: Mapping[str, Any]) -> Footer:
    """The footer of a Parquet file of `size` bytes: one ranged read, and another where it is a large one.

    Raises:
        ArrowException: the file is no whole Parquet file.
    """
    fs, inner = filesystem(path, storage_options)

    def last(count: int) -> bytes:
        count = min(count, size)
        read = partial(fs.cat_file, inner, start=size - count, end=size)
        data: bytes = deadline.within(deadline.sized(count), read) if count else b""
        return data

    tail = last(_TAIL_BYTES)
    footer = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < footer <= size:
        tail = last(footer)
    with pq.ParquetFile(pa.BufferReader(tail)) as parquet:
        digest = hashlib.sha256(tail[-footer:]).hexdigest()
        return Footer(parquet.metadata, parquet.schema_arrow, footer - 8, digest)


@contextmanager
def open_parquet(path: str, storage_options: Mapping[str, Any], **how: Any) -> Iterator[pq.ParquetFile]:
    """An open Parquet file; `how` goes to `pyarrow.parquet.ParquetFile`."""
    fs, inner = filesystem(path, storage_options)
    if isinstance(fs, LocalFileSystem):
        with pq.ParquetFile(inner, **how) as parquet:
            yield parquet
    else:
        # Columns are read in turns: a read-ahead cache shared by them would fetch everything several times.
        opened = deadline.within(deadline.REQUEST, lambda: fs.open(inner, "rb", cache_type="none"))
        with opened, pq.ParquetFile(deadline.TimedFile(opened), **how) as parquet:
            yield parquet


def is_damage(error: BaseException) -> bool:
    """Whether pyarrow means the file's bytes: it raises its own errors or an OSError without a number, while
    disks and networks give theirs a number or a type of its own."""
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


def _expand(path: str, storage_options: Mapping[str, Any]) -> list[Found]:
    fs, inner = filesystem(path, storage_options)
    fs.invalidate_cache()
    try:
        files = persistently(path, lambda: deadline.within(deadline.UNSIZED, lambda: _list(fs, inner)))
    except StorageError:
        raise
    except Exception as error:
        # Every store's client has errors of its own.
        raise InputError(
            f"cannot be listed ({type(error).__name__}: {error})", path, "check path and access"
        ) from None
    if not files:
        raise _no_files(fs, inner, path) or InputError(
            "no file matches", path, "give a Parquet file, a folder with *.parquet in it, or a glob"
        )

    def listed(name: str, info: Mapping[str, Any]) -> Found:
        # A store may list an object without its size (HTTP folders do): only asking for it by name tells.
        known = info if info.get("size") is not None else persistently(path, lambda: _info(fs, name))
        return _found(_full(path, fs, name), known)._replace(keys=keys_of(name.removeprefix(root)))

    root = _root(inner)
    return [listed(name, info) for name, info in files.items()]


def _info(fs: fsspec.AbstractFileSystem, inner: str) -> dict[str, Any]:
    return deadline.within(deadline.REQUEST, lambda: fs.info(inner))


_TEXTS = {
    ".csv": "pyarrow.csv.read_csv({path!r})",
    ".tsv": "pyarrow.csv.read_csv({path!r}, parse_options=pyarrow.csv.ParseOptions(delimiter='\\t'))",
    ".jsonl": "pyarrow.json.read_json({path!r})",
    ".ndjson": "pyarrow.json.read_json({path!r})",
    ".json": "pyarrow.json.read_json({path!r})",
}


def conversion(path: str) -> InputError | None:
    """The error about a file of text, with the line that makes Parquet of it; None for any other."""
    name = path.lower()
    ending = next((ending for ending in _TEXTS if name.endswith((ending, f"{ending}.gz"))), None)
    if ending is None:
        return None
    target = path[: name.rfind(ending)] + ".parquet"
    if "://" in path:
        line = f"duckdb -c \"COPY (FROM '{path}') TO '{target}'\""
    else:
        module = "csv" if "csv" in _TEXTS[ending] else "json"
        read = _TEXTS[ending].format(path=path)
        line = f'python -c "import pyarrow.{module}, pyarrow.parquet; pyarrow.parquet.write_table({read}, {target!r})"'
    return InputError(f"{ending[1:]} is not Parquet", path, f"convert it with: {line}")


def _no_files(fs: fsspec.AbstractFileSystem, inner: str, path: str) -> InputError | None:
    """What to say of a folder without Parquet files: whether it has files of text."""
    names = sorted(fs.find(inner)) if fs.isdir(inner) else []
    return next((error for name in names if (error := conversion(_full(path, fs, name)))), None)


def _list(fs: fsspec.AbstractFileSystem, inner: str) -> dict[str, dict[str, Any]]:
    if fs.isfile(inner):
        return {inner: fs.info(inner)}
    if fs.isdir(inner):
        return _in_folder(fs, inner)
    files: dict[str, dict[str, Any]] = {}
    for name, info in fs.glob(inner, detail=True).items():
        if _hidden(name.rstrip("/").rpartition("/")[2]):
            continue
        if info["type"] == "directory":
            files |= _in_folder(fs, name)
        else:
            files[name] = info
    return files


def _in_folder(fs: fsspec.AbstractFileSystem, folder: str) -> dict[str, dict[str, Any]]:
    start = len(folder.rstrip("/")) + 1
    return {
        name: info
        for name, info in fs.find(folder, detail=True).items()
        if name.endswith(".parquet") and not any(_hidden(part) for part in name[start:].split("/"))
    }


def _root(inner: str) -> str:
    """The folder that a path, or a glob from its first wildcard on, looks into."""
    fixed = re.split(r"[*?\[]", inner, maxsplit=1)[0]
    return inner.rstrip("/") + "/" if fixed == inner else fixed[: fixed.rfind("/") + 1]


def _hidden(name: str) -> bool:
    return name.startswith(("_", "."))


def _found(path: str, info: Mapping[str, Any]) -> Found:
    return Found(path, int(info["size"]), version_of(info))


def _full(asked: str, fs: fsspec.AbstractFileSystem, inner: str) -> str:
    if isinstance(fs, LocalFileSystem):
        return inner
    if "::" not in asked:
        return str(fs.unstrip_protocol(inner))
    links = asked.split("::")
    place = next(i for i, link in enumerate(links) if "://" in link)
    links[place] = f"{links[place].partition('://')[0]}://{inner.lstrip('/')}"
    return "::".join(links)
