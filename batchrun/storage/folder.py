"""A folder by URL: whole objects in and out, put-if-absent, and patience with a store that is busy."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import fsspec.core
from fsspec.implementations.local import LocalFileSystem

from batchrun.errors import OutputError, StorageError, one_line
from batchrun.storage import deadline
from batchrun.storage.backoff import back_off, kept_failing
from batchrun.storage.deadline import DeadlineExceeded
from batchrun.storage.faults import http_status, is_transient, is_unauthorised
from batchrun.storage.local import LocalStore
from batchrun.storage.protocols import refuse_unknown
from batchrun.storage.remote import remote_store
from batchrun.storage.store import Data, NotFound, Store, Unconditional

T = TypeVar("T")

# Seconds, for `back_off`.
FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0
PATIENCE = 300.0
PROBE_PATIENCE = 15.0
# Seconds for a single request.
MINIMUM = 1.0


@contextmanager
def first_contact() -> Iterator[None]:
    """Inside, what a store forbids is refused, and so is a file where a folder should be: nothing has begun that could
    go on later.

    Raises:
        OutputError: credentials are missing or wrong, or there is such a file.
    """
    try:
        yield
    except StorageError as error:
        cause = error.__cause__
        if cause is not None and (is_unauthorised(cause) or isinstance(cause, NotADirectoryError)):
            raise OutputError(error.what, error.where, error.fix) from error
        raise


class Folder:
    """Small and picklable; all folders of a process with the same URL share one client.

    Keys are relative, with "/" between names. Any call may raise StorageError: after `PATIENCE` seconds of
    jittered back-off where the store is only busy, at once where waiting cannot help. An object is written as
    one complete put, since an exception inside an open fsspec writer publishes what was written so far.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = url
        self.storage_options = dict(storage_options or {})

    @property
    def name(self) -> str:
        """The URL for a person's eyes, without a user's password and a slash at its end."""
        return re.sub(r"(?<=[^:/])/+$", "", re.sub(r"://[^/@]*@", "://", self.url))

    def where(self, key: str) -> str:
        """The key's full place, for a person's eyes."""
        return f"{self.name.rstrip('/')}/{key}" if key else self.name

    def list(self, prefix: str = "", follow_links: bool = True) -> dict[str, int]:
        """Every key that starts with `prefix`, at any depth, and its size in bytes; never cached.

        Without `follow_links`, symbolic links on a disk, and all that lies behind them, are left out.
        """
        parent = prefix.rpartition("/")[0]
        found = self._with_retries(
            prefix, lambda store: store.find(parent, follow_links), seconds=deadline.UNSIZED
        )
        return {key: size for key, size in found.items() if key.startswith(prefix)}

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        """The object's bytes, or its bytes [start, end). Raises NotFound, a FileNotFoundError."""
        seconds = deadline.UNSIZED if end is None else deadline.sized(end - (start or 0))
        return self._with_retries(key, lambda store: store.read(key, start, end), seconds=seconds)

    def size(self, key: str) -> int | None:
        """Bytes of the object, None where there is none: asked of the store anew."""
        return self._with_retries(key, lambda store: store.size(key))

    def exists(self, key: str) -> bool:
        """Whether the object is there: asked of the store anew."""
        return self.size(key) is not None

    def modified(self, key: str) -> float | None:
        """When the object was written, by the store's clock (Unix time); None where it cannot say."""
        return self._with_retries(key, lambda store: store.modified(key))

    def put(self, key: str, data: Data, patience: float | None = None) -> None:
        """Writes the whole object, from bytes or from a local file, in place of what was there.

        `patience` in seconds is `PATIENCE` unless the caller has less.
        """
        self._with_retries(key, lambda store: store.put(key, data), patience, saving=_size(data))

    def put_if_absent(self, key: str, data: Data) -> bool:
        """Writes the whole object unless the key is there; whether this call is known to have written it.

        False may also mean that an earlier try of this very call succeeded and its acknowledgement was lost:
        who must know reads the object. A store without conditional create is asked first, then written to.
        """
        try:
            return self._with_retries(key, lambda store: store.create(key, data), saving=_size(data))
        except Unconditional:
            if self.exists(key):
                return False
            self.put(key, data)
            return True

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes the objects, in batches where the store can; a missing one is fine."""
        batch = [*keys]
        if batch:
            self._with_retries(batch[0], lambda store: store.delete(batch), seconds=deadline.UNSIZED)

    def probe(self) -> bool:
        """Tries a write, a conditional create and a delete; whether the store honours the condition.

        Raises:
            OutputError: the folder cannot be written to.
        """
        key = f"_job/probe-{uuid.uuid4().hex}"
        try:
            self.put(key, b"first", PROBE_PATIENCE)
            try:
                return not self._with_retries(key, lambda store: store.create(key, b"second"), PROBE_PATIENCE)
            except Unconditional:
                return False
            finally:
                self.delete([key])
        except StorageError as error:
            raise OutputError(f"cannot be written to: {error.what}", self.name, error.fix) from error

    def abort_uploads(self) -> int:
        """Aborts unfinished multipart uploads below this folder (S3 bills for them); how many there were."""
        return self._with_retries("", lambda store: store.abort_uploads(), seconds=deadline.UNSIZED)

    def _with_retries(
        self,
        key: str,
        action: Callable[[Store], T],
        patience: float | None = None,
        seconds: float = deadline.REQUEST,
        saving: int | None = None,
    ) -> T:
        """`seconds` are one request's; those of one that saves bytes follow from how many."""
        patience = PATIENCE if patience is None else patience
        at_stop = deadline.REQUEST_AT_STOP
        if saving is not None:
            seconds = deadline.sized(saving)
            at_stop = deadline.SAVING_AT_STOP + saving / deadline.RATE_AT_STOP
        renewed = hung = False

        def ask(renew: bool) -> T:
            store = _store(self.url, self.storage_options, renew)
            if isinstance(store, LocalStore):
                return action(store)
            # A store that fails already is not hoped for at the end.
            limit = deadline.REQUEST_AT_STOP if self.url in _failing else at_stop
            return deadline.within(min(seconds, max(patience, MINIMUM)), lambda: action(store), limit)

        def once() -> T:
            nonlocal renewed, hung
            try:
                # Connections that hang stay with the client that opened them.
                found = ask(renew=hung)
                _failing.discard(self.url)
                return found
            except Exception as error:
                hung = isinstance(error, DeadlineExceeded)
                if is_transient(error):
                    _failing.add(self.url)
                if renewed or not is_unauthorised(error):
                    raise
            renewed = True
            return ask(renew=True)

        try:
            return back_off(self.where(key), patience, FIRST_WAIT, LONGEST_WAIT)(once)
        except (Unconditional, NotFound, OutputError):
            raise
        except Exception as error:
            # Other built-in errors are bugs of the program, and stay what they are. gcsfs has ValueError for a
            # bad request.
            if isinstance(error, OSError | ValueError) or type(error).__module__ != "builtins":
                raise self._explained(error, key) from error
            raise

    def _explained(self, error: Exception, key: str) -> StorageError:
        what, where = _words(error), self.where(key)
        if is_transient(error):
            return kept_failing(error, where)
        if is_unauthorised(error):
            return StorageError(
                f"access denied ({what})", where, "check the credentials and what they may do"
            )
        if isinstance(error, NotADirectoryError | FileExistsError):
            return StorageError(
                "there is a file where a folder should be", where, "remove it, or give another output.path"
            )
        if isinstance(error, FileNotFoundError) or http_status(error) == 404:
            return StorageError(
                f"no such bucket or folder ({what})", where, "create it, or correct output.path"
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageError("no space left", where, "free some and run again to go on from here")
        return StorageError(what, where, "check output.path and output.storage_options")


def _words(error: Exception) -> str:
    """The system's own words where it has some, without a number and the path that is told beside them."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return error.strerror
    return one_line(error)


def _size(data: Data) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size


# URLs of stores whose last request failed, though another may not.
_failing: set[str] = set()
_stores: dict[tuple[int, str, str], Store] = {}
_stores_lock = threading.Lock()


def _store(url: str, options: Mapping[str, Any], renew: bool = False) -> Store:
    """The process's store for a URL; `renew` builds its client again, so that it reads new credentials."""
    place = (os.getpid(), url, json.dumps(options, sort_keys=True, default=repr))
    with _stores_lock:
        if renew or place not in _stores:
            own = {"use_listings_cache": False, "skip_instance_cache": True}
            refuse_unknown(url, OutputError)
            fs, root = fsspec.core.url_to_fs(url, **{**own, **options})
            _stores[place] = LocalStore(root) if isinstance(fs, LocalFileSystem) else remote_store(fs, root)
        return _stores[place]
