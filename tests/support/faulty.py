"""`faulty://name/...`: an object store in memory whose every request can be made to go wrong, on purpose.

What it assumes of a real store: one put is one step, so every object is one that some put was given in full.
`truncate` breaks even that, for the tests of readers that must notice. A request is named by its operation
("find", "info", "read", "put", "create", "delete") and key.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

FAULTS = ("reset", "lost", "busy", "truncate", "stale", "full", "denied")

# Given an operation and its key: None lets the request through, else a fault. It may also block, or raise.
Gate = Callable[[str, str], str | None]


@dataclass
class FaultyStore:
    """The objects (key: bytes) of one store. `previous` is what they were before the last change."""

    objects: dict[str, bytes] = field(default_factory=dict)
    previous: dict[str, bytes] = field(default_factory=dict)
    written: dict[str, float] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    scripted: list[tuple[str, str, str]] = field(default_factory=list)
    gate: Gate | None = None
    after: Callable[[str, str, Any], None] | None = None
    conditional: bool = True
    lock: threading.RLock = field(default_factory=threading.RLock)

    def script(self, operation: str, part_of_key: str, *faults: str) -> None:
        """The next requests of this kind go wrong, each with the next of `faults`."""
        assert set(faults) <= set(FAULTS)
        self.scripted += [(operation, part_of_key, fault) for fault in faults]

    def counts(self) -> Counter[str]:
        return Counter(operation for operation, _ in self.requests)

    def request(
        self, operation: str, key: str, effect: Callable[[dict[str, bytes]], Any], prefix: Any = None
    ) -> Any:
        """One request: `effect` on the objects, or the fault in place of it, before it, or after it."""
        fault = self._scripted(operation, key)
        if fault is None and self.gate is not None:
            fault = self.gate(operation, key)
        with self.lock:
            self.requests.append((operation, key))
            if fault == "reset":
                raise ConnectionResetError(errno.ECONNRESET, "reset before the request arrived")
            if fault == "busy":
                raise OSError(errno.EBUSY, "SlowDown: 503")
            if fault == "full":
                raise OSError(errno.ENOSPC, "no space left on device")
            if fault == "denied":
                raise PermissionError(errno.EACCES, "ExpiredToken")
            before = dict(self.objects)
            try:
                if fault == "truncate":
                    prefix(self.objects)
                    raise ConnectionResetError(errno.ECONNRESET, "reset in the middle of the body")
                result = effect(dict(self.previous) if fault == "stale" else self.objects)
            finally:
                if self.objects != before:
                    self.previous = before
            if self.after is not None:
                self.after(operation, key, result)
            if fault == "lost":
                raise ConnectionResetError(errno.ECONNRESET, "reset before the answer arrived")
            return result

    def _scripted(self, operation: str, key: str) -> str | None:
        for i, (wanted, part_of_key, fault) in enumerate(self.scripted):
            if wanted == operation and part_of_key in key:
                del self.scripted[i]
                return fault
        return None


stores: dict[str, FaultyStore] = {}


def new_store(name: str) -> FaultyStore:
    """A fresh store, reached as `faulty://<name>/<folder>`."""
    stores[name] = FaultyStore()
    return stores[name]


class FaultyFileSystem(AbstractFileSystem):
    protocol = "faulty"
    cachable = False

    def _store(self, path: str) -> FaultyStore:
        return stores[path.split("/")[0]]

    def find(
        self, path: str, maxdepth: Any = None, withdirs: bool = False, detail: bool = False, **kw: Any
    ) -> Any:
        def effect(objects: dict[str, bytes]) -> Any:
            names = sorted(key for key in objects if key.startswith(f"{path}/"))
            return {n: {"name": n, "size": len(objects[n]), "type": "file"} for n in names}

        return self._store(path).request("find", path, effect)

    def info(self, path: str, **kw: Any) -> dict[str, Any]:
        def effect(objects: dict[str, bytes]) -> dict[str, Any]:
            if path not in objects:
                raise FileNotFoundError(path)
            return {"name": path, "size": len(objects[path]), "type": "file"}

        return self._store(path).request("info", path, effect)

    def modified(self, path: str) -> datetime:
        written = self._store(path).written
        if path not in written:
            raise FileNotFoundError(path)
        return datetime.fromtimestamp(written[path], UTC)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kw: Any) -> bytes:
        def effect(objects: dict[str, bytes]) -> bytes:
            if path not in objects:
                raise FileNotFoundError(path)
            return objects[path][start:end]

        return self._store(path).request("read", path, effect)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kw: Any) -> None:
        store = self._store(path)

        def put(objects: dict[str, bytes]) -> None:
            if mode == "create" and store.conditional and path in objects:
                raise FileExistsError(path)
            objects[path] = value
            store.written[path] = time.time()

        def put_prefix(objects: dict[str, bytes]) -> None:
            objects[path] = value[: len(value) // 2]

        store.request("create" if mode == "create" else "put", path, put, put_prefix)

    def put_file(
        self, lpath: str, rpath: str, callback: Any = None, mode: str = "overwrite", **kw: Any
    ) -> None:
        with open(os.fspath(lpath), "rb") as file:
            self.pipe_file(rpath, file.read(), mode=mode)

    def rm(self, path: Any, recursive: bool = False, maxdepth: Any = None) -> None:
        # Key by key, since a batch is no single step of a real store either.
        for one in [path] if isinstance(path, str) else list(path):
            self._store(one).request("delete", one, lambda objects, one=one: objects.pop(one, None))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """An object store has no folders."""


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
