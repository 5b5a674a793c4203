"""Keeps secrets out of everything that is shown: messages, logs, JSON, HTML."""

from __future__ import annotations

import html
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

# user:password@ in a URL, which a storage path may carry.
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")

# A line of a longer secret, such as a key in PEM form, is one as well: errors show single lines.
_SHORTEST_LINE = 8

# How a secret may be spelt in what is shown.
_ENCODINGS: tuple[Callable[[str], str], ...] = (
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: repr(text)[1:-1],
    # Where other text around it decides which quotes are escaped.
    lambda text: repr(f"\"'{text}")[4:-1],
    lambda text: repr(text.encode())[2:-1],
    lambda text: repr(f"\"'{text}".encode())[5:-1],
    html.escape,
    lambda text: html.escape(text, quote=False),
    # As Jinja has it.
    lambda text: html.escape(text).replace("&quot;", "&#34;").replace("&#x27;", "&#39;"),
    quote,
    lambda text: quote(text, safe=""),
    quote_plus,
)


class Redactor:
    """Replaces every known secret, in whatever encoding, and credentials inside URLs, by `***`."""

    def __init__(self) -> None:
        self._secrets: set[str] = set()
        self._known: re.Pattern[str] | None = None

    def add(self, secrets: Iterable[str]) -> None:
        """From now on these are replaced, too, and parts of theirs that are secret by themselves."""
        self._secrets |= {part for secret in secrets for part in _parts(secret) if part}
        spelt = {form for secret in self._secrets for form in _spellings(secret)}
        # The longest first: a secret may begin with another one.
        forms = sorted(spelt, key=len, reverse=True)
        self._known = re.compile("|".join(map(_pattern, forms))) if forms else None

    def __call__(self, text: str) -> str:
        """The text without secrets."""
        if self._known is not None:
            text = self._known.sub("***", text)
        return _URL_CREDENTIALS.sub("***", text)

    def values(self, value: Any) -> Any:
        """Plain values with every text in them redacted; numbers stay, whatever their digits spell."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            return {self(str(name)): self.values(inner) for name, inner in value.items()}
        if isinstance(value, Iterable):
            return [self.values(inner) for inner in value]
        return value

    def filter_record(self, record: logging.LogRecord) -> bool:
        """A logging filter: rewrites the record in place and lets it pass."""
        record.msg, record.args = self(record.getMessage()), None
        if record.exc_info:
            record.exc_text = self(logging.Formatter().formatException(record.exc_info))
        return True


def _parts(secret: str) -> Iterator[str]:
    yield secret
    yield from (line for line in secret.splitlines() if len(line) >= _SHORTEST_LINE)


def _spellings(secret: str) -> set[str]:
    """The secret in every encoding, and in two of them one after the other: JSON in HTML, the repr of JSON."""
    once = {secret, *(encode(secret) for encode in _ENCODINGS)}
    return once | {encode(form) for form in once for encode in _ENCODINGS}


def _pattern(form: str) -> str:
    """Matches the form; digits of URL escapes in either case, also of a URL inside a URL (%252f)."""
    return re.sub(r"%((?:25)*[0-9A-F]{2})", lambda match: f"%(?i:{match[1]})", re.escape(form))
