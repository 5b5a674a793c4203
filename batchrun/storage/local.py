"""A folder on a mounted disk."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from batchrun.storage.store import Data, NotFound, Unconditional

# Beside the data and never inside it; in the same file system, so that a link works.
TEMPORARY = "_job/tmp"

NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EXDEV}
NOT_THERE = (FileNotFoundError, NotADirectoryError)


class LocalStore:
    """Objects come into place by a rename, or a hard link, of a synced temporary file.

    `link` fails where the name is taken, on network file systems too. fsspec's own local `mode="create"`
    looks first and writes later, so that several callers win.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def find(self, parent: str, follow_links: bool = True) -> dict[str, int]:
        """See `Store`. A folder that goes away meanwhile has no keys. Raises NotADirectoryError where it is a file."""
        found: dict[str, int] = {}
        folders = [parent]
        while folders:
            folder = folders.pop()
            with suppress(FileNotFoundError), os.scandir(self.root / folder) as entries:
                for entry in entries:
                    key = f"{folder}/{entry.name}" if folder else entry.name
                    if not follow_links and entry.is_symlink():
                        continue
                    if entry.is_dir():
                        folders.append(key)
                        continue
                    with suppress(FileNotFoundError):
                        found[key] = entry.stat().st_size
        return found

    def read(self, key: str, start: int | None, end: int | None) -> bytes:
        """See `Store`."""
        first = start or 0
        try:
            with open(self.root / key, "rb") as file:
                file.seek(first)
                return file.read() if end is None else file.read(end - first)
        except NOT_THERE as error:
            raise NotFound(key) from error

    def size(self, key: str) -> int | None:
        """See `Store`: of regular files only."""
        status = self._status(key)
        return None if status is None else status.st_size

    def modified(self, key: str) -> float | None:
        """See `Store`."""
        status = self._status(key)
        return None if status is None else status.st_mtime

    def put(self, key: str, data: Data) -> None:
        """See `Store`: by a rename."""
        with self._temporary(data) as temporary:
            self._place(os.replace, temporary, key)

    def create(self, key: str, data: Data) -> bool:
        """See `Store`: by a hard link. Raises Unconditional where the disk has none."""
        with self._temporary(data) as temporary:
            try:
                self._place(os.link, temporary, key)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in NO_HARD_LINKS:
                    raise Unconditional(str(error)) from error
                raise
            return True

    def delete(self, keys: Sequence[str]) -> None:
        """See `Store`. Folders that become empty go, too."""
        for key in keys:
            with suppress(FileNotFoundError):
                os.unlink(self.root / key)
        for folder in {Path(key).parent for key in keys}:
            self._prune(folder)

    def abort_uploads(self) -> int:
        """A disk has none."""
        return 0

    def _status(self, key: str) -> os.stat_result | None:
        try:
            status = (self.root / key).stat()
        except NOT_THERE:
            return None
        return status if stat.S_ISREG(status.st_mode) else None

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
                # Another process pruned the empty folder in between.
                continue
            _sync(target.parent)
            return
        raise OSError(errno.EBUSY, "the folder disappears as fast as it is made", str(target.parent))

    def _prune(self, folder: Path) -> None:
        """Removes folders that became empty: a store of objects has none either."""
        while folder.name:
            try:
                os.rmdir(self.root / folder)
            except OSError:
                # Not empty, or gone: either is as it should be.
                return
            folder = folder.parent


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
