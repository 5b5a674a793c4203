"""One folder on one fsspec filesystem: whole objects in and out, conditional create, patience with a busy store.

Every path of the output is joined here and nowhere else. An object becomes visible only as one complete put, because
an exception inside an open fsspec writer publishes whatever was written so far.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec.core
import tenacity
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from batchrun.errors import OutputError, StorageError

T = TypeVar("T")
Data = bytes | Path

log = logging.getLogger(__name__)

# Back-off: the n-th wait is a random time up to FIRST_WAIT * 2**n seconds, never above LONGEST_WAIT.
FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0
PATIENCE = 300.0
PROBE_PATIENCE = 15.0

# Temporary files of local writes: beside the data, never inside it, on the same file system so that a link works.
TEMPORARY = "_job/tmp"

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
AZURE = {"abfs", "abfss", "az"}

TRANSIENT_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
TRANSIENT_ERRNO = {
    errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EPIPE,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, getattr(errno, "EREMOTEIO", errno.EIO),
}  # fmt: skip
# Codes that come with a final-looking status. A completed multipart upload whose acknowledgement was lost is gone.
TRANSIENT_CODES = {"NoSuchUpload", "RequestTimeout", "SlowDown", "InternalError", "OperationAborted"}
TRANSIENT_CLASSES = {
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.parsers.ResponseParserError",
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "azure.core.exceptions.ServiceRequestError",
    "azure.core.exceptions.ServiceResponseError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "requests.exceptions.ProxyError",
    "requests.exceptions.ChunkedEncodingError",
    "http.client.IncompleteRead",
}
EXPIRED_CODES = {
    "ExpiredToken",
    "ExpiredTokenException",
    "TokenRefreshRequired",
    "InvalidToken",
    "RequestExpired",
}
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EXDEV}


class Folder:
    """A folder by URL. Small and picklable; all folders of a process with the same URL share one client.

    Keys are relative, with "/" between names. Any call may raise StorageError, after `PATIENCE` seconds of back-off
    where the store is only busy, at once where waiting cannot help.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = url
        self.storage_options = dict(storage_options or {})

    @property
    def name(self) -> str:
        """The URL for a person's eyes, without a user's password."""
        return re.sub(r"://[^/@]*@", "://", self.url)

    def list(self, prefix: str = "") -> dict[str, int]:
        """Every key that starts with `prefix`, at any depth, and its size in bytes: always asked of the store anew."""
        parent = prefix.rpartition("/")[0]
        found = self._patiently(prefix, lambda store: store.list(parent))
        return {key: size for key, size in found.items() if key.startswith(prefix)}

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        """The object's bytes, or its bytes [start, end). Raises FileNotFoundError."""
        return self._patiently(key, lambda store: store.read(key, start, end))

    def size(self, key: str) -> int | None:
        """Bytes of the object, None where there is none: one request to the store, never a cached listing."""
        return self._patiently(key, lambda store: store.size(key))

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def modified(self, key: str) -> float | None:
        """When the object was last written by the store's own clock (Unix seconds); None where it does not say."""
        return self._patiently(key, lambda store: store.modified(key))

    def put(self, key: str, data: Data) -> None:
        """Writes the whole object at once, from bytes or from a local file, in place of what was there."""
        self._patiently(key, lambda store: store.put(key, data))

    def put_if_absent(self, key: str, data: Data) -> bool:
        """Writes the whole object unless the key is there already; whether this call is known to have written it.

        False may also mean that an earlier try of this very call succeeded and its acknowledgement was lost: who
        must know reads the object. A store that cannot create conditionally is asked first and then written to.
        """
        try:
            return self._patiently(key, lambda store: store.create(key, data))
        except Unconditional:
            if self.exists(key):
                return False
            self.put(key, data)
            return True

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes the objects, in batches where the store has them; a missing one is fine."""
        if batch := list(keys):
            self._patiently(batch[0], lambda store: store.delete(batch))

    def probe(self) -> bool:
        """Tries a write, a conditional create and a delete; whether the store honours the condition.

        Raises:
            OutputError: the folder cannot be written to.
        """
        key = f"_job/probe-{uuid.uuid4().hex}"
        try:
            self._patiently(key, lambda store: store.put(key, b"first"), PROBE_PATIENCE)
            try:
                return not self._patiently(key, lambda store: store.create(key, b"second"), PROBE_PATIENCE)
            except Unconditional:
                return False
            finally:
                self.delete([key])
        except StorageError as error:
            raise OutputError(
                error.what, self.name, error.fix or "give output.path a folder to write to"
            ) from error

    def abort_uploads(self) -> int:
        """Aborts unfinished multipart uploads below this folder (S3 bills for them); how many there were."""
        return self._patiently("", lambda store: store.abort_uploads())

    def _patiently(self, key: str, action: Callable[[Store], T], patience: float | None = None) -> T:
        renewed = False

        def once() -> T:
            nonlocal renewed
            try:
                return action(_store(self.url, self.storage_options))
            except Exception as error:
                if renewed or not _is_unauthorised(error):
                    raise
            renewed = True
            return action(_store(self.url, self.storage_options, renew=True))

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_transient),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT),
            stop=tenacity.stop_after_delay(PATIENCE if patience is None else patience),
            before_sleep=self._note,
            reraise=True,
        )
        try:
            return retrying(once)
        except (Unconditional, NotFound):
            raise
        except Exception as error:
            if isinstance(error, OSError) or type(error).__module__ != "builtins":
                raise self._explain(error, key) from error
            raise

    def _note(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning("%s: %s, trying again", self.name, _one_line(error))

    def _explain(self, error: Exception, key: str) -> StorageError:
        where = f"{self.name.rstrip('/')}/{key}"
        if _is_transient(error):
            return StorageError(
                f"the store kept failing ({_one_line(error)})", where, "run again to go on from here"
            )
        if _is_unauthorised(error):
            return StorageError(
                f"access denied ({_one_line(error)})", where, "check the credentials and their rights"
            )
        if isinstance(error, FileNotFoundError):
            return StorageError(
                f"no such bucket or folder ({_one_line(error)})", where, "create it, or mend output.path"
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageError("no space left", where, "free some and run again to go on from here")
        return StorageError(_one_line(error), where, "mend output.path or output.storage_options")


class NotFound(FileNotFoundError):
    """The key that was to be read is not there; any other missing thing (a bucket) is a plain FileNotFoundError."""


class Unconditional(Exception):
    """The store has no conditional create at all."""


class Store(Protocol):
    """What a folder needs of one kind of storage; each call is a single try."""

    def list(self, parent: str) -> dict[str, int]: ...
    def read(self, key: str, start: int | None, end: int | None) -> bytes: ...
    def size(self, key: str) -> int | None: ...
    def modified(self, key: str) -> float | None: ...
    def put(self, key: str, data: Data) -> None: ...
    def create(self, key: str, data: Data) -> bool: ...
    def delete(self, keys: list[str]) -> None: ...
    def abort_uploads(self) -> int: ...


class LocalStore:
    """A folder on a mounted disk. Objects are put in place by a rename or a hard link of a synced temporary file."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def list(self, parent: str) -> dict[str, int]:
        found: dict[str, int] = {}
        folders = [parent]
        while folders:
            folder = folders.pop()
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root / folder) as entries:
                for entry in entries:
                    key = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir():
                        folders.append(key)
                        continue
                    with suppress(FileNotFoundError):
                        found[key] = entry.stat().st_size
        return found

    def read(self, key: str, start: int | None, end: int | None) -> bytes:
        try:
            with open(self.root / key, "rb") as file:
                file.seek(start or 0)
                return file.read() if end is None else file.read(end - (start or 0))
        except FileNotFoundError as error:
            raise NotFound(key) from error

    def size(self, key: str) -> int | None:
        try:
            return (self.root / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def modified(self, key: str) -> float | None:
        try:
            return (self.root / key).stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None

    def put(self, key: str, data: Data) -> None:
        with self._temporary(data) as temporary:
            self._place(os.replace, temporary, key)

    def create(self, key: str, data: Data) -> bool:
        with self._temporary(data) as temporary:
            try:
                self._place(os.link, temporary, key)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in NO_LINKS:
                    raise Unconditional(str(error)) from error
                raise
            return True

    def delete(self, keys: list[str]) -> None:
        for key in keys:
            with suppress(FileNotFoundError):
                os.unlink(self.root / key)
        for folder in {Path(key).parent for key in keys}:
            self._prune(folder)

    def abort_uploads(self) -> int:
        return 0

    @contextmanager
    def _temporary(self, data: Data) -> Iterator[Path]:
        path = self.root / TEMPORARY / uuid.uuid4().hex
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if isinstance(data, Path):
                shutil.copyfile(data, path)
            else:
                path.write_bytes(data)
            _sync(path)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _place(self, how: Callable[[Path, Path], None], temporary: Path, key: str) -> None:
        target = self.root / key
        for _ in range(10):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                how(temporary, target)
            except FileNotFoundError:
                if not temporary.exists():
                    raise
                continue  # another process pruned the empty folder in between
            _sync(target.parent)
            return
        raise OSError(errno.EBUSY, "the folder disappears as fast as it is made", str(target.parent))

    def _prune(self, folder: Path) -> None:
        while folder.name:
            try:
                os.rmdir(self.root / folder)
            except OSError:
                return  # not empty, or gone: either is as it should be
            folder = folder.parent


class RemoteStore:
    """A folder on any other fsspec filesystem."""

    # Neither memory:// nor the like can create conditionally by itself; within a process a lock does.
    lock = threading.Lock()

    def __init__(self, fs: Any, root: str) -> None:
        self.fs = fs
        self.root = root.rstrip("/")
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self.in_memory = isinstance(fs, MemoryFileSystem)
        self.needs_folders = not (protocols & OBJECT_STORES) and not self.in_memory
        self.create_only: dict[str, Any] = {"overwrite": False} if protocols & AZURE else {"mode": "create"}

    def list(self, parent: str) -> dict[str, int]:
        self.fs.invalidate_cache()
        try:
            found = self.fs.find(self._path(parent), detail=True)
        except FileNotFoundError:
            return {}
        skip = len(self.root) + 1
        files = ((name[skip:], info["size"]) for name, info in found.items() if info["type"] == "file")
        return {key: int(size or 0) for key, size in files if key and not key.endswith("/")}

    def read(self, key: str, start: int | None, end: int | None) -> bytes:
        try:
            return self.fs.cat_file(self._path(key), start=start, end=end)
        except FileNotFoundError as error:
            raise NotFound(key) from error

    def size(self, key: str) -> int | None:
        info = self._info(key)
        return None if info is None else int(info["size"])

    def modified(self, key: str) -> float | None:
        self.fs.invalidate_cache()
        try:
            return self.fs.modified(self._path(key)).timestamp()
        except (FileNotFoundError, NotImplementedError):
            return None

    def put(self, key: str, data: Data) -> None:
        self._write(key, data)

    def create(self, key: str, data: Data) -> bool:
        if self.in_memory:
            with self.lock:
                if self.size(key) is not None:
                    return False
                self._write(key, data)
                return True
        try:
            self._write(key, data, **self.create_only)
        except FileExistsError:
            return False
        except (NotImplementedError, TypeError, ValueError) as error:
            raise Unconditional(str(error)) from error
        except OSError as error:
            # S3-like stores that leave the condition out of the body reach us as a plain EINVAL.
            if _status(error) == 412:
                return False
            if _status(error) == 501:
                raise Unconditional(str(error)) from error
            raise
        return True

    def delete(self, keys: list[str]) -> None:
        try:
            self.fs.rm([self._path(key) for key in keys])
        except FileNotFoundError:
            for key in keys:
                with suppress(FileNotFoundError):
                    self.fs.rm_file(self._path(key))

    def abort_uploads(self) -> int:
        if not hasattr(self.fs, "list_multipart_uploads"):
            return 0
        bucket, prefix, _ = self.fs.split_path(self.root)
        found = self.fs.call_s3(
            "list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/" if prefix else ""
        )
        uploads = found.get("Uploads", [])
        for upload in uploads:
            with suppress(FileNotFoundError):
                self.fs.call_s3(
                    "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )
        return len(uploads)

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}".rstrip("/")

    def _info(self, key: str) -> dict[str, Any] | None:
        self.fs.invalidate_cache()
        try:
            info = self.fs.info(self._path(key))
        except FileNotFoundError:
            return None
        return info if info["type"] == "file" else None

    def _write(self, key: str, data: Data, **how: Any) -> None:
        path = self._path(key)
        if self.needs_folders:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        if isinstance(data, bytes):
            self.fs.pipe_file(path, data, **how)
        elif self.in_memory:
            self.fs.pipe_file(path, data.read_bytes(), **how)
        else:
            self.fs.put_file(str(data), path, **how)


_stores: dict[tuple[int, str, str], Store] = {}
_stores_lock = threading.Lock()


def _store(url: str, options: Mapping[str, Any], renew: bool = False) -> Store:
    """The process's store for a URL; `renew` builds its client again, so that new credentials are picked up."""
    place = (os.getpid(), url, json.dumps(options, sort_keys=True, default=repr))
    with _stores_lock:
        if renew or place not in _stores:
            fs, root = fsspec.core.url_to_fs(
                url, **{"use_listings_cache": False, "skip_instance_cache": True, **options}
            )
            _stores[place] = LocalStore(root) if isinstance(fs, LocalFileSystem) else RemoteStore(fs, root)
        return _stores[place]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of botocore, aiohttp, azure or gcsfs, if there is one."""
    for e in _chain(error):
        response = getattr(e, "response", None)
        if isinstance(response, dict) and "HTTPStatusCode" in response.get("ResponseMetadata", {}):
            return int(response["ResponseMetadata"]["HTTPStatusCode"])
        for name in ("status_code", "status", "code"):
            if str(value := getattr(e, name, "")).isdigit():
                return int(value)
    return None


def _code(error: BaseException) -> str:
    for e in _chain(error):
        response = getattr(e, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError) or _code(error) in TRANSIENT_CODES:
        return True
    classes = {f"{c.__module__}.{c.__qualname__}" for e in _chain(error) for c in type(e).__mro__}
    if classes & TRANSIENT_CLASSES:
        return True
    status = _status(error)
    if status is not None:
        return status in TRANSIENT_STATUS
    return isinstance(error, OSError) and error.errno in TRANSIENT_ERRNO


def _is_unauthorised(error: BaseException) -> bool:
    return isinstance(error, PermissionError) or _status(error) in (401, 403) or _code(error) in EXPIRED_CODES


def _one_line(error: BaseException | None) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
