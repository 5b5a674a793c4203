"""A folder on any fsspec filesystem but the local one."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from batchrun.storage.faults import http_status, is_conflict
from batchrun.storage.store import Data, NotFound, Unconditional

AZURE = {"abfs", "abfss", "az"}
# Keys there need no folder made first, and making one may make a bucket.
GOOGLE = {"gs", "gcs"}
OBJECT_STORES = {"s3", "s3a", *GOOGLE, *AZURE}

# What fsspec says about each path.
Listing = dict[str, dict[str, Any]]


class RemoteStore:
    """Whole-object calls only (`pipe_file`, `put_file`, `cat_file`), and never a cached listing."""

    # memory:// looks first and writes later; within its one process a lock makes that one step.
    memory_lock = threading.Lock()

    def __init__(self, fs: Any, root: str) -> None:
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self.fs = fs
        self.root = root.rstrip("/")
        self.in_memory = isinstance(fs, MemoryFileSystem)
        self.needs_folders = not (self.in_memory or protocols & OBJECT_STORES)
        # s3fs sends If-None-Match, gcsfs ifGenerationMatch=0; adlfs knows `mode` only in late versions.
        self.if_absent: dict[str, Any] = {"overwrite": False} if protocols & AZURE else {"mode": "create"}

    def find(self, parent: str, follow_links: bool = True) -> dict[str, int]:
        """See `Store`."""
        self.fs.invalidate_cache()
        try:
            found = self._listing(parent)
        except FileNotFoundError:
            return {}
        below = f"{self.root}/"
        # gcsfs looks a missing folder up as a prefix and finds its namesakes. S3 consoles mark empty folders
        # by objects whose names end in a slash.
        return {
            name.removeprefix(below): int(info["size"] or 0)
            for name, info in found.items()
            if info["type"] == "file" and name.startswith(below) and not name.endswith("/")
        }

    def read(self, key: str, start: int | None, end: int | None) -> bytes:
        """See `Store`."""
        try:
            return cast(bytes, self.fs.cat_file(self._path(key), start=start, end=end))
        except FileNotFoundError as error:
            raise NotFound(key) from error

    def size(self, key: str) -> int | None:
        """See `Store`."""
        self.fs.invalidate_cache()
        try:
            info = self.fs.info(self._path(key))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def modified(self, key: str) -> float | None:
        """See `Store`."""
        self.fs.invalidate_cache()
        try:
            return float(self.fs.modified(self._path(key)).timestamp())
        except (FileNotFoundError, NotImplementedError):
            return None

    def put(self, key: str, data: Data) -> None:
        """See `Store`."""
        self._write(key, data)

    def create(self, key: str, data: Data) -> bool:
        """See `Store`: by the store's own conditional put."""
        if self.in_memory:
            with self.memory_lock:
                if self.size(key) is not None:
                    return False
                self._write(key, data)
                return True
        if getattr(self.fs.pipe_file, "__func__", None) is AbstractFileSystem.pipe_file:
            raise Unconditional("fsspec's own create looks first and writes later")
        try:
            self._write(key, data, **self.if_absent)
        except (NotImplementedError, TypeError) as error:
            raise Unconditional(str(error)) from error
        except Exception as error:
            if is_conflict(error):
                return False
            if http_status(error) == 501:
                raise Unconditional(str(error)) from error
            raise
        return True

    def delete(self, keys: Sequence[str]) -> None:
        """See `Store`: one request for many keys where the store has such."""
        try:
            self.fs.rm([self._path(key) for key in keys])
        except FileNotFoundError:
            for key in keys:
                with suppress(FileNotFoundError):
                    self.fs.rm_file(self._path(key))

    def abort_uploads(self) -> int:
        """None that fsspec could name."""
        return 0

    def _listing(self, parent: str) -> Listing:
        return cast(Listing, self.fs.find(self._path(parent), detail=True))

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}".rstrip("/")

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


class S3Store(RemoteStore):
    """S3 without the requests that s3fs spends on telling a missing file from a folder."""

    def size(self, key: str) -> int | None:
        """See `Store`: one HEAD request."""
        bucket, name, _ = self.fs.split_path(self._path(key))
        try:
            return int(
                self.fs.call_s3("head_object", self.fs.req_kw, Bucket=bucket, Key=name)["ContentLength"]
            )
        except FileNotFoundError:
            return None

    def abort_uploads(self) -> int:
        """See `Store`."""
        bucket, key, _ = self.fs.split_path(self.root)
        below = f"{key}/" if key else ""
        try:
            found = self.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=below)
        except OSError as error:
            if http_status(error) == 501 or error.errno == errno.ENOSYS:
                # A store that cannot list them has none to bill for.
                return 0
            raise
        uploads = [(upload["Key"], upload["UploadId"]) for upload in found.get("Uploads", [])]
        for name, upload_id in uploads:
            with suppress(FileNotFoundError):
                self.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=name, UploadId=upload_id)
        return len(uploads)

    def _listing(self, parent: str) -> Listing:
        if not parent:
            return super()._listing(parent)
        return cast(Listing, self.fs.find(self.root, prefix=f"{parent}/", detail=True))


class GoogleStore(RemoteStore):
    """Google's store, for which gcsfs frames small objects by a fixed line, whatever they hold.

    An object with that line in it (an answer may well say it) would end there. Sent in chunks, nothing frames it.
    """

    FRAME = b"--==0=="
    SMALL = 5 << 20

    def _write(self, key: str, data: Data, **how: Any) -> None:
        if isinstance(data, Path) and data.stat().st_size < self.SMALL:
            data = data.read_bytes()
        if isinstance(data, bytes) and self.FRAME in data:
            how["chunksize"] = len(data)
        super()._write(key, data, **how)


def remote_store(fs: Any, root: str) -> RemoteStore:
    """The store for an fsspec filesystem, with what S3 and Google's need beyond fsspec."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if hasattr(fs, "call_s3"):
        return S3Store(fs, root)
    return GoogleStore(fs, root) if protocols & GOOGLE else RemoteStore(fs, root)
