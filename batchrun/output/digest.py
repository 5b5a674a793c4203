"""The digest of a part's bytes, which the part itself carries in its footer.

It is the SHA-256 of the whole file with zeros where the digest stands, so that no other object has to be written with a
part, and whoever finds the part finds the digest: a later run, a retry, the manifest.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

BLANK = "0" * 64


def stamp(path: Path) -> str:
    """Puts the digest of a finished Parquet file in place of the `BLANK` in its footer; the digest."""
    with path.open("r+b") as file:
        file.seek(-8, 2)
        footer = int.from_bytes(file.read(4), "little") + 8
        start = file.seek(-footer, 2)
        place = _place(file.read(), BLANK)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(start + place)
        file.write(digest.encode())
    return digest


def matches(data: bytes, digest: str) -> bool:
    """Whether `data`, a whole part, has the digest that stands in it."""
    footer = max(0, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))
    try:
        place = footer + _place(data[footer:], digest)
    except ValueError:
        return False
    view = memoryview(data)
    found = hashlib.sha256(view[:place])
    found.update(BLANK.encode())
    found.update(view[place + len(BLANK) :])
    return found.hexdigest() == digest


def _place(footer: bytes, digest: str) -> int:
    """Where the digest stands in a footer. Raises ValueError where it does not, or more than once."""
    written = f'"digest": "{digest}"'.encode()
    if footer.count(written) != 1:
        raise ValueError("no digest in the footer")
    return footer.index(written) + len(b'"digest": "')
