"""One hash for everything that is pinned, in every process and version of Python."""

from __future__ import annotations

import hashlib
import json


def stable_hash(value: object) -> str:
    """Hex SHA-256 of a JSON value, the same in every process and version of Python."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
