"""Input and output are kept apart: answers must not become input, nor input lie where answers are written."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from batchrun.errors import OutputError
from batchrun.job.job import Job

# Several names of one protocol.
_ALIASES = {"": "file", "local": "file", "s3a": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs"}
_MAGIC = "*?["
# Names of what a run writes: a glob that matches one of them, or a folder above it, would read answers.
_WRITTEN = ("data/part-00000-00000000.parquet", "_job/plans/00000.parquet")


class _Place(NamedTuple):
    """A path in one form that can be compared: protocol, server ("" where the options name none), clean path."""

    protocol: str
    server: str
    path: str

    def is_on_the_same_store(self, other: _Place) -> bool:
        return self.protocol == other.protocol and (
            self.server == other.server or "" in (self.server, other.server)
        )


def refuse_overlap(job: Job) -> None:
    """Refuses an output folder inside the input, and input inside the output folder, before anything is listed.

    Paths and URLs are compared after normalizing them, local ones also with their symbolic links resolved. Globs are
    compared by what they would match.

    Raises:
        OutputError: names both places.
    """
    options = job.input.storage_options
    outputs = list(_places(job.output.path, job.output.storage_options))
    local = outputs[0].protocol == "file"
    written = [*_WRITTEN, *([f"{job.output.failed}/part.parquet"] if job.output.failed else [])]
    for path in job.input.paths:
        for one in _inputs(path, options) if local else _places(path, options):
            for output in outputs:
                if one.is_on_the_same_store(output) and _overlap(one.path, output.path, written):
                    raise _refused(job, path)


def refuse_files_in_output(job: Job, files: Iterable[str]) -> None:
    """The same for the input's files as they were listed: a glob may have matched into the output folder."""
    outputs = list(_places(job.output.path, job.output.storage_options))
    for folder in sorted({posixpath.dirname(path) for path in files}):
        for one in _places(folder, job.input.storage_options):
            if any(one.is_on_the_same_store(output) and _within(one.path, output.path) for output in outputs):
                raise _refused(job, folder)


def covers(pattern: str, file: str, options: Mapping[str, Any]) -> bool:
    """Whether an input path (a file, folder or glob) names the listed `file`, as far as the names tell."""
    return any(
        one.protocol == other.protocol and (_within(other.path, one.path) or _matches(one.path, other.path))
        for one in _places(pattern, options)
        for other in _places(file, options)
    )


def _refused(job: Job, path: str) -> OutputError:
    return OutputError(
        f"input and output overlap: answers would become input, or the other way round (input {path})",
        f"output.path {job.output.path}",
        "give output.path a folder that is neither inside the input nor around it",
    )


def _overlap(source: str, output: str, written: Iterable[str]) -> bool:
    if _within(source, output) or _within(_fixed(source), output) or _within(output, source):
        return True
    return any(_matches(source, posixpath.join(output, name)) for name in written)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _matches(pattern: str, path: str) -> bool:
    """Whether a glob matches the path or a folder above it, which would be read whole."""
    if not _has_magic(pattern):
        return False
    glob = re.compile(glob_translate(pattern))
    while path not in ("", "/"):
        if glob.match(path):
            return True
        path = posixpath.dirname(path)
    return False


def _has_magic(path: str) -> bool:
    return any(character in path for character in _MAGIC)


def _fixed(pattern: str) -> str:
    """The folders of a glob in front of its first wildcard."""
    names = pattern.split("/")
    place = next((i for i, name in enumerate(names) if _has_magic(name)), len(names))
    return "/".join(names[:place])


def _inputs(path: str, options: Mapping[str, Any]) -> Iterator[_Place]:
    """The input path, and on a local disk what it leads to through symbolic links."""
    yield from _places(path, options)
    place = _place(path, options)
    if place.protocol != "file":
        return
    for entry in LocalFileSystem().glob(place.path) if _has_magic(place.path) else [place.path]:
        for target in (os.path.realpath(entry), *_linked(entry)):
            yield place._replace(path=target)


def _linked(folder: str) -> Iterator[str]:
    """Where the symbolic links below a local folder lead, links in linked folders among them."""
    waiting, seen = [folder], set()
    while waiting:
        for root, folders, files in os.walk(waiting.pop()):
            for name in (*folders, *files):
                path = os.path.join(root, name)
                if os.path.islink(path) and (target := os.path.realpath(path)) not in seen:
                    seen.add(target)
                    waiting.append(target)
                    yield target


def _places(url: str, options: Mapping[str, Any]) -> Iterator[_Place]:
    """The place as it is written and, on a local disk, with its symbolic links resolved."""
    place = _place(url, options)
    yield place
    if place.protocol == "file":
        fixed = _fixed(place.path)
        yield place._replace(path=os.path.realpath(fixed) + place.path[len(fixed) :])


def _place(url: str, options: Mapping[str, Any]) -> _Place:
    # Of a chain such as zip://*.parquet::s3://lake/a.zip the last link is where the bytes are.
    protocol, _, path = url.split("::")[-1].rpartition("://")
    protocol = _ALIASES.get(protocol, protocol)
    if protocol == "file":
        return _Place(protocol, "", os.path.abspath(os.path.expanduser(path)))
    container, slash, rest = path.lstrip("/").partition("/")
    # abfs://container@account... and user@host name what the options, or nothing, name otherwise.
    container = container.partition("@")[0] if protocol == "abfs" else container.rpartition("@")[2]
    clean = posixpath.normpath(f"/{container}{slash}{rest}")
    client = options.get("client_kwargs")
    server = options.get("endpoint_url") or (client or {}).get("endpoint_url") or options.get("account_name")
    return _Place(protocol, str(server or "").rstrip("/"), clean)
