"""Small JSON objects in the store that know whether they are whole."""

from __future__ import annotations

import json
from typing import Any

from batchrun.hashing import stable_hash


class Damaged(ValueError):
    """Not a document, cut short, or changed since it was written."""


def encode(values: dict[str, Any]) -> bytes:
    """JSON text with the digest of its values among them."""
    return json.dumps({**values, "sha256": stable_hash(values)}, indent=1, sort_keys=True).encode()


def decode(data: bytes) -> dict[str, Any]:
    """The values that were encoded. Raises Damaged where the bytes are not those."""
    try:
        values: dict[str, Any] = json.loads(data)
        digest = values.pop("sha256")
        whole = digest == stable_hash(values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error
    if not whole:
        raise Damaged("its digest does not match")
    return values
