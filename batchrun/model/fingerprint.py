"""What a model's files hold, as one hash over all their bytes.

Weights are tens of gigabytes, so that a digest is computed at most once for a file: the hub's own is taken where the
file lies in its cache, and one that was computed is kept in the user's cache folder under the file's path, size and
modification time. Hashing reads the files into the page cache, from which the engine then loads them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeVar

from batchrun.hashing import stable_hash

log = logging.getLogger(__name__)

T = TypeVar("T")

# A smaller file is hashed in less time than its digest is looked up.
KEPT_FROM = 1 << 20
# Seconds. A file that was written just now may be written again under the same modification time.
SETTLED = 2.0

# hashlib leaves the interpreter to others meanwhile: threads hash as fast as the disk reads, or the cores can.
HASHERS = 16

_BLOCK = 64 << 10
_BLOCKS = 64
# The hub's cache: blobs/<digest>, to which snapshots/<commit>/<name> links. Large files have a SHA-256 for a name.
_BLOB = re.compile(r"blobs/([0-9a-f]{64})$")


def fingerprint(folder: str, names: Sequence[str]) -> str:
    """Hex SHA-256 of the names and contents of these files, the same wherever the folder lies."""
    gate = threading.Semaphore(min(HASHERS, os.cpu_count() or 1))

    def digest(name: str) -> str:
        with gate:
            return _digest(Path(folder) / name)

    found = [(name, in_background(partial(digest, name))) for name in names]
    return stable_hash([[name, digest.result()] for name, digest in found])


def in_background(work: Callable[[], T]) -> Future[T]:
    """Calls `work` in a daemon thread: a process that has nothing else to do ends without waiting for it."""
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            # Whoever asks for the result gets it.
            found.set_exception(error)

    threading.Thread(target=run, name="batchrun-fingerprint", daemon=True).start()
    return found


def sampled(folder: str, names: Sequence[str], weights: Sequence[str]) -> str:
    """The fingerprint as earlier versions pinned it: of large files among the `weights`, 64 blocks of 64 KiB."""
    digest = hashlib.sha256()
    for name in names:
        file = Path(folder) / name
        size = file.stat().st_size
        digest.update(f"{name}\n{size}\n".encode())
        for block in _blocks(file, size, name in weights):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    """batchrun's own folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchrun"


def _digest(file: Path) -> str:
    """Hex SHA-256 of the file."""
    real = file.resolve()
    if match := _BLOB.search(real.as_posix()):
        return match[1]
    started, status = time.time(), real.stat()
    state: list[str | int] = [str(real), status.st_size, status.st_mtime_ns]
    kept = cache_folder() / "digests" / f"{stable_hash(str(real))[:32]}.json"
    if status.st_size >= KEPT_FROM and (known := _recall(kept, state)) is not None:
        return known
    with real.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if status.st_size >= KEPT_FROM and started - status.st_mtime > SETTLED:
        _keep(kept, state, digest)
    return digest


def _recall(kept: Path, state: list[str | int]) -> str | None:
    try:
        values = json.loads(kept.read_text())
        return str(values["sha256"]) if values["file"] == state else None
    except (OSError, ValueError, KeyError, TypeError):
        # Not there, or cut short: the file is hashed again.
        return None


def _keep(kept: Path, state: list[str | int], digest: str) -> None:
    """Puts a whole file in place by a rename; without a cache folder to write to, files are hashed every time."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        made = kept.with_name(f"{kept.name}.{uuid.uuid4().hex}")
        made.write_text(json.dumps({"file": state, "sha256": digest}))
        made.replace(kept)
    except OSError as error:
        log.warning(
            "the digest of %s could not be kept (%s); every run will compute it again", state[0], error
        )


def _blocks(file: Path, size: int, sample: bool) -> Iterator[bytes]:
    with file.open("rb") as stream:
        if not sample or size <= _BLOCK * _BLOCKS:
            yield from iter(lambda: stream.read(1 << 20), b"")
            return
        # The first block starts the file, the last one ends it.
        for i in range(_BLOCKS):
            stream.seek((size - _BLOCK) * i // (_BLOCKS - 1))
            yield stream.read(_BLOCK)
