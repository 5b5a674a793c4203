"""Keeps secrets out of everything that is shown: messages, logs, JSON."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

# user:password@ in a URL, which a storage path may carry.
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")


class Redactor:
    """Replaces every known secret, and credentials inside URLs, by `***`."""

    def __init__(self) -> None:
        self._secrets: list[str] = []

    def add(self, secrets: Iterable[str]) -> None:
        self._secrets = sorted({*self._secrets, *secrets}, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return _URL_CREDENTIALS.sub("***", text)

    def filter_record(self, record: logging.LogRecord) -> bool:
        """A logging filter: rewrites the record in place and lets it pass."""
        record.msg, record.args = self(record.getMessage()), None
        return True
