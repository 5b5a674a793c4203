"""Durations and deadlines as a job file or a command line writes them."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def parse_duration(text: str) -> timedelta:
    """A duration such as 90s, 30m, 6h, 1d or 1h30m.

    Raises:
        ValueError: it is none, or nothing at all.
    """
    match = _DURATION.fullmatch(text.strip())
    if not match or not any(match.groups()):
        raise ValueError(f"{text!r} is not a duration such as 90s, 30m, 6h or 1h30m")
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    try:
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    except OverflowError:
        raise ValueError(f"{text!r} is too long: give a duration such as 90s, 30m, 6h or 1h30m") from None


def parse_deadline(text: str, now: datetime) -> datetime:
    """An ISO 8601 time, local unless it names an offset, or a duration from `now` on (which has a time zone).

    Raises:
        ValueError: it is neither.
    """
    try:
        return now + parse_duration(text)
    except (ValueError, OverflowError):
        pass
    try:
        return datetime.fromisoformat(text.strip()).astimezone()
    except (ValueError, OverflowError):
        raise ValueError(
            f"{text!r} is neither a duration such as 6h nor a time such as 2026-01-31T06:00+01:00"
        ) from None
