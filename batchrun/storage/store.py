"""What a folder needs of one kind of storage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

Data = bytes | Path


class NotFound(FileNotFoundError):
    """The key that was to be read is not there. A missing bucket is a plain FileNotFoundError."""


class Unconditional(Exception):
    """The store has no conditional create at all."""


class Store(Protocol):
    """Keys relative to one folder. Each call is a single try and raises what its library raises."""

    def find(self, parent: str, follow_links: bool = True) -> dict[str, int]:
        """Keys and sizes of all objects below the folder `parent` ("" is all), empty where it is missing.

        `follow_links` is for disks: whether symbolic links are taken for what they lead to, or left out.
        """
        ...

    def read(self, key: str, start: int | None, end: int | None) -> bytes:
        """The object's bytes [start, end), to its end where that is None. Raises NotFound."""
        ...

    def size(self, key: str) -> int | None:
        """Bytes of the object, None where there is none."""
        ...

    def modified(self, key: str) -> float | None:
        """When it was written (Unix time, the store's clock); None where it is not there or the store cannot say."""
        ...

    def put(self, key: str, data: Data) -> None:
        """Writes the whole object in place of what was there."""
        ...

    def create(self, key: str, data: Data) -> bool:
        """Puts unless the key is there, in one step; False where it was. May raise Unconditional."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes the objects; a missing one is fine."""
        ...

    def abort_uploads(self) -> int:
        """Aborts unfinished multipart uploads below the folder; how many there were."""
        ...
